//! What a route is: a type, so that server, client and document can't disagree.

use berth_model::access::Action;
use serde::Serialize;
use serde::de::DeserializeOwned;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;

/// How a route's bodies travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointKind {
    /// JSON in, JSON out.
    Json,
    /// Any bytes in, JSON out: the body is streamed and never held in memory.
    Upload,
    /// Bytes out: the reply is streamed.
    Download,
    /// Server-sent events out, each of them a reply as JSON.
    Events,
    /// A websocket.
    WebSocket,
    /// The connection is handed over to a protocol of its own.
    Upgrade,
    /// Plain text out.
    Text,
}

/// A route.
pub trait Endpoint: Send + Sync + 'static {
    /// The HTTP method, in capitals.
    const METHOD: &'static str;
    /// The path, with `{names}` that are fields of [`Self::Path`].
    const PATH: &'static str;
    /// What the caller must be allowed to do.
    const ACTION: Action;
    /// How the bodies travel.
    const KIND: EndpointKind;
    /// The operation's id in the document: the type's name.
    const NAME: &'static str;
    /// One line for the document.
    const SUMMARY: &'static str;
    /// The parts of the path.
    type Path: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// The query.
    type Query: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// The request's body; `()` for none.
    type Body: Serialize + DeserializeOwned + Send + Sync + utoipa::ToSchema + 'static;
    /// The answer's body; `()` for none.
    type Reply: Serialize + DeserializeOwned + Send + Sync + utoipa::ToSchema + 'static;
}

/// A named schema with those that it refers to.
#[derive(Clone)]
pub struct SchemaSet {
    /// The schema's name, as it stands under `components/schemas`; empty for `()`.
    pub name: String,
    /// The schema itself, for types without a name of their own.
    pub schema: RefOr<Schema>,
    /// Those it refers to, by name.
    pub others: Vec<(String, RefOr<Schema>)>,
}

/// Collects the schema of a type for the document.
pub fn schema_of<T: utoipa::ToSchema>() -> SchemaSet {
    let mut others = Vec::new();
    T::schemas(&mut others);
    SchemaSet { name: T::name().into_owned(), schema: T::schema(), others }
}

/// What is known of a route without its types: for the document and for the tests that cover all of them.
#[derive(Clone, Copy)]
pub struct EndpointInfo {
    /// The type's name.
    pub name: &'static str,
    /// The method.
    pub method: &'static str,
    /// The path.
    pub path: &'static str,
    /// The action.
    pub action: Action,
    /// How the bodies travel.
    pub kind: EndpointKind,
    /// One line.
    pub summary: &'static str,
    /// The schema of the body.
    pub body: fn() -> SchemaSet,
    /// The schema of the reply.
    pub reply: fn() -> SchemaSet,
    /// The names of the query's fields, by serialising its default.
    pub query: fn() -> Vec<String>,
}

/// The information of one route.
pub const fn info<E: Endpoint>() -> EndpointInfo
where
    E::Query: Default,
{
    EndpointInfo {
        name: E::NAME,
        method: E::METHOD,
        path: E::PATH,
        action: E::ACTION,
        kind: E::KIND,
        summary: E::SUMMARY,
        body: schema_of::<E::Body>,
        reply: schema_of::<E::Reply>,
        query: query_fields::<E::Query>,
    }
}

fn query_fields<Q: Serialize + Default>() -> Vec<String> {
    match serde_json::to_value(Q::default()) {
        Ok(serde_json::Value::Object(fields)) => fields.keys().cloned().collect(),
        _ => Vec::new(),
    }
}

/// No parts in the path, or nothing in the query.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Nothing {}

/// Declares routes, and `ENDPOINTS`, the list of all that were declared together.
#[macro_export]
macro_rules! endpoints {
    ($($(#[doc = $doc:literal])* $name:ident: $method:ident $path:literal, $kind:ident, $action:ident,
        path $path_type:ty, query $query:ty, body $body:ty, reply $reply:ty;)*) => {
        $(
            $(#[doc = $doc])*
            pub enum $name {}

            impl $crate::endpoint::Endpoint for $name {
                const METHOD: &'static str = stringify!($method);
                const PATH: &'static str = $path;
                const ACTION: berth_model::access::Action = berth_model::access::Action::$action;
                const KIND: $crate::endpoint::EndpointKind = $crate::endpoint::EndpointKind::$kind;
                const NAME: &'static str = stringify!($name);
                const SUMMARY: &'static str = concat!($($doc),*);
                type Path = $path_type;
                type Query = $query;
                type Body = $body;
                type Reply = $reply;
            }
        )*

        /// Every route of this contract.
        pub const ENDPOINTS: &[$crate::endpoint::EndpointInfo] = &[$($crate::endpoint::info::<$name>()),*];
    };
}
