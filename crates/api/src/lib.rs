//! Both HTTP contracts of Berth: what the manager answers and what an agent answers.
//!
//! A route is declared once, as a type that implements [`Endpoint`]: method, path, the action that it needs, and the
//! types of its path, query, body and reply. The servers mount handlers by that type, the client calls by that type,
//! and the OpenAPI document is made from the same list; so none of them can say something else than the others.
//!
//! Read in this order: [`endpoint`], the two contracts [`manager`] and [`agent`], then how they travel: [`tls`] (who
//! is who), [`transport`] and [`client`] (asking), [`serve`] (answering), and [`openapi`].

pub mod endpoint;

pub mod agent;
pub mod backup;
pub mod manager;

pub mod join;
pub mod pki;
pub mod tls;

pub mod client;
pub mod serve;
pub mod transport;

pub mod openapi;

pub use client::{Client, ClientError};
pub use endpoint::{Endpoint, EndpointInfo, EndpointKind};
pub use transport::{Body, Transport, TransportError};
