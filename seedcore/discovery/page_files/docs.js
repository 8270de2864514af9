// The OpenAPI document by Swagger UI. The page's policy allows no script in its HTML.

const { SwaggerUIBundle } = window;

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  layout: "BaseLayout",
  presets: [SwaggerUIBundle.presets.apis],
});
