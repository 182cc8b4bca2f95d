//! The OpenAPI documents, made from the lists of routes.

use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ObjectBuilder, Ref, Schema, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathsBuilder, RefOr, Required,
    ResponseBuilder,
};

use crate::endpoint::{EndpointInfo, EndpointKind, SchemaSet, schema_of};

/// The manager's document.
pub fn manager() -> OpenApi {
    document(
        "Berth manager",
        "What users, consoles and programs ask of a cluster.",
        crate::manager::ENDPOINTS,
    )
}

/// The agent's document.
pub fn agent() -> OpenApi {
    document(
        "Berth agent",
        "What the manager asks of a host, and hosts of each other.",
        crate::agent::ENDPOINTS,
    )
}

fn document(title: &str, description: &str, endpoints: &[EndpointInfo]) -> OpenApi {
    let mut components = ComponentsBuilder::new().security_scheme(
        "bearer",
        SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
    );
    let problem = schema_of::<berth_model::Problem>();
    components = with_schemas(components, &problem);
    let mut paths = PathsBuilder::new();
    for endpoint in endpoints {
        let (body, reply) = ((endpoint.body)(), (endpoint.reply)());
        for set in [&body, &reply] {
            components = with_schemas(components, set);
        }
        let operation = operation(endpoint, &body, &reply, &problem);
        paths = paths.path(endpoint.path, PathItem::new(method(endpoint.method), operation));
    }
    OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title(title)
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(description))
                .license(Some(utoipa::openapi::LicenseBuilder::new().name("Apache-2.0").build()))
                .build(),
        )
        .paths(paths.build())
        .components(Some(components.build()))
        .build()
}

fn with_schemas(components: ComponentsBuilder, set: &SchemaSet) -> ComponentsBuilder {
    let mut components = components;
    if is_named(set) {
        components = components.schema(set.name.clone(), set.schema.clone());
    }
    components.schemas_from_iter(set.others.iter().cloned())
}

fn is_named(set: &SchemaSet) -> bool {
    !is_unit(set) && set.name.starts_with(|first: char| first.is_ascii_uppercase())
}

fn is_unit(set: &SchemaSet) -> bool {
    matches!(set.name.as_str(), "" | "TupleUnit" | "()")
}

fn schema_ref(set: &SchemaSet) -> RefOr<Schema> {
    if is_named(set) { Ref::from_schema_name(set.name.clone()).into() } else { set.schema.clone() }
}

fn method(text: &str) -> HttpMethod {
    match text {
        "GET" => HttpMethod::Get,
        "POST" => HttpMethod::Post,
        "PUT" => HttpMethod::Put,
        "PATCH" => HttpMethod::Patch,
        "DELETE" => HttpMethod::Delete,
        other => unreachable!("the contract has no method {other}"),
    }
}

fn operation(
    endpoint: &EndpointInfo,
    body: &SchemaSet,
    reply: &SchemaSet,
    problem: &SchemaSet,
) -> utoipa::openapi::path::Operation {
    let action = endpoint.action.as_str();
    let mut operation = OperationBuilder::new()
        .operation_id(Some(endpoint.name))
        .summary(Some(endpoint.summary.trim()))
        .description(Some(format!("Needs the action `{action}`.")));
    if endpoint.action != berth_model::access::Action::Public {
        operation = operation.security(SecurityRequirement::new("bearer", Vec::<String>::new()));
    }
    for name in path_fields(endpoint.path) {
        operation = operation.parameter(parameter(name, ParameterIn::Path, Required::True));
    }
    for name in (endpoint.query)() {
        operation = operation.parameter(parameter(&name, ParameterIn::Query, Required::False));
    }
    if endpoint.kind == EndpointKind::Upload {
        let content = ContentBuilder::new().schema(Some(binary())).build();
        let body = RequestBodyBuilder::new()
            .content("application/octet-stream", content)
            .required(Some(Required::True));
        operation = operation.request_body(Some(body.build()));
    } else if !is_unit(body) {
        let content = ContentBuilder::new().schema(Some(schema_ref(body))).build();
        let body =
            RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True));
        operation = operation.request_body(Some(body.build()));
    }
    let failure = ContentBuilder::new().schema(Some(schema_ref(problem))).build();
    operation
        .response(status(endpoint.kind), answer(endpoint.kind, reply))
        .response(
            "default",
            ResponseBuilder::new().description("What was wrong").content("application/json", failure),
        )
        .build()
}

const fn status(kind: EndpointKind) -> &'static str {
    match kind {
        EndpointKind::WebSocket | EndpointKind::Upgrade => "101",
        EndpointKind::Json
        | EndpointKind::Upload
        | EndpointKind::Download
        | EndpointKind::Events
        | EndpointKind::Text => "200",
    }
}

fn answer(kind: EndpointKind, reply: &SchemaSet) -> ResponseBuilder {
    let response = ResponseBuilder::new().description("Done");
    match kind {
        EndpointKind::Json | EndpointKind::Upload | EndpointKind::Events if !is_unit(reply) => {
            let kind = if kind == EndpointKind::Events { "text/event-stream" } else { "application/json" };
            response.content(kind, ContentBuilder::new().schema(Some(schema_ref(reply))).build())
        }
        EndpointKind::Download => {
            response.content("application/octet-stream", ContentBuilder::new().schema(Some(binary())).build())
        }
        EndpointKind::Text => {
            response.content("text/plain", ContentBuilder::new().schema(Some(text())).build())
        }
        EndpointKind::Json
        | EndpointKind::Upload
        | EndpointKind::Events
        | EndpointKind::WebSocket
        | EndpointKind::Upgrade => response,
    }
}

fn text() -> RefOr<Schema> {
    ObjectBuilder::new().schema_type(Type::String).build().into()
}

fn binary() -> RefOr<Schema> {
    use utoipa::openapi::schema::{KnownFormat, SchemaFormat};
    ObjectBuilder::new()
        .schema_type(Type::String)
        .format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)))
        .build()
        .into()
}

fn parameter(name: &str, place: ParameterIn, required: Required) -> ParameterBuilder {
    ParameterBuilder::new().name(name).parameter_in(place).required(required).schema(Some(text()))
}

fn path_fields(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_in_its_document_with_everything_it_refers_to() {
        for (document, endpoints) in
            [(manager(), crate::manager::ENDPOINTS), (agent(), crate::agent::ENDPOINTS)]
        {
            let json = serde_json::to_value(&document).expect("json");
            for endpoint in endpoints {
                let operation = &json["paths"][endpoint.path][endpoint.method.to_lowercase()];
                assert_eq!(operation["operationId"], endpoint.name, "{} {}", endpoint.method, endpoint.path);
            }
            let text = json.to_string();
            for reference in text.split("#/components/schemas/").skip(1) {
                let name = reference.split('"').next().unwrap_or_default();
                assert!(
                    !json["components"]["schemas"][name].is_null(),
                    "{name} is referred to and not there"
                );
            }
        }
    }

    #[test]
    fn routes_are_told_apart_by_method_and_path() {
        for endpoints in [crate::manager::ENDPOINTS, crate::agent::ENDPOINTS] {
            let mut seen = std::collections::BTreeSet::new();
            for endpoint in endpoints {
                assert!(
                    seen.insert((endpoint.method, endpoint.path)),
                    "{} {}",
                    endpoint.method,
                    endpoint.path
                );
            }
        }
    }
}
