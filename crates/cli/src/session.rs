//! What a command has to work with: a client of the manager, a place for answers, and Ctrl-C.

use std::future::Future;
use std::sync::Arc;

use berth_api::Client;
use berth_api::endpoint::Endpoint;
use berth_api::manager::{CanI, CanIQuery, Page};
use berth_api::transport::TlsTransport;
use berth_api::{endpoint::Nothing, pki, tls};
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode};
use serde::Serialize;
use tokio::sync::Notify;

use crate::config::{self, Config, Environment};
use crate::exit::Failure;
use crate::output::Output;

/// A manager to ask and a place for the answers.
pub struct Session {
    /// The manager.
    pub client: Client,
    /// Where answers go.
    pub output: Output,
    interrupt: Interrupt,
}

/// How it is known that the user doesn't want to wait any longer.
enum Interrupt {
    Signal,
    #[cfg_attr(not(test), expect(dead_code, reason = "tests interrupt without a signal"))]
    Given(Arc<Notify>),
}

impl Session {
    /// Opens what configuration and environment say.
    ///
    /// # Errors
    /// When it is not known which cluster to talk to.
    pub fn open(output: Output) -> Result<Self, Failure> {
        let config = config::resolve(&Environment::read())?;
        if let Some(warning) = &config.warning {
            output.remark(warning);
        }
        Self::with_config(&config, output)
    }

    /// Opens this cluster.
    ///
    /// # Errors
    /// When the CA's certificate is not one.
    pub fn with_config(config: &Config, output: Output) -> Result<Self, Failure> {
        // The name, not the address, is what the cluster's own CA vouches for.
        let name = tls::server_name(pki::MANAGER_NAME).map_err(anyhow::Error::new)?;
        let tls = tls::client_config(&config.ca_pem, None)
            .map_err(|error| Failure::field("ca", error, "the cluster's CA certificate in PEM"))?;
        let client = Client::new(Arc::new(TlsTransport::new(config.address.clone(), name, tls)));
        let client = match &config.token {
            Some(token) => client.with_token(token),
            None => client,
        };
        Ok(Self { client, output, interrupt: Interrupt::Signal })
    }

    /// A session for tests, ended by `interrupt` instead of Ctrl-C.
    #[cfg(test)]
    pub fn for_test(client: Client, output: Output, interrupt: Arc<Notify>) -> Self {
        Self { client, output, interrupt: Interrupt::Given(interrupt) }
    }

    /// Asks a route that takes no body.
    ///
    /// # Errors
    /// What the manager said, or that it can't be reached.
    pub async fn ask<E: Endpoint<Body = ()>>(
        &self,
        path: &E::Path,
        query: &E::Query,
    ) -> Result<E::Reply, Failure> {
        Ok(self.client.call::<E>(path, query, &()).await?)
    }

    /// Sends a body to a route.
    ///
    /// # Errors
    /// What the manager said, or that it can't be reached.
    pub async fn send<E: Endpoint>(
        &self,
        path: &E::Path,
        query: &E::Query,
        body: &E::Body,
    ) -> Result<E::Reply, Failure> {
        Ok(self.client.call::<E>(path, query, body).await?)
    }

    /// Reads a list page by page: `limit` items, or all.
    ///
    /// # Errors
    /// As [`Self::ask`]; also for a manager whose pages don't end.
    pub async fn pages<E, T>(
        &self,
        path: &E::Path,
        limit: Option<u32>,
        query: impl Fn(Option<u32>, Option<String>) -> E::Query,
    ) -> Result<Vec<T>, Failure>
    where
        E: Endpoint<Body = (), Reply = Page<T>>,
    {
        let wanted = limit.map_or(usize::MAX, |limit| limit as usize);
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let page_limit = u32::try_from(wanted - items.len()).ok();
            let page = self.ask::<E>(path, &query(page_limit, cursor.clone())).await?;
            let progressed = !page.items.is_empty() && page.next_cursor != cursor;
            items.extend(page.items);
            if items.len() >= wanted {
                items.truncate(wanted);
                return Ok(items);
            }
            match page.next_cursor {
                None => return Ok(items),
                Some(_) if !progressed => {
                    let message = format!("{} gives pages that don't end", self.client.address());
                    return Err(Problem::new(ProblemCode::Internal, message).into());
                }
                next => cursor = next,
            }
        }
    }

    /// For a change that the manager can't be asked to only try: says what it would do, if it is allowed.
    ///
    /// # Errors
    /// When it is not allowed, or can't be asked.
    pub async fn would(&self, action: Action, resource: Option<&str>, summary: &str) -> Result<(), Failure> {
        let query = CanIQuery { action: action.as_str().to_owned(), resource: resource.map(str::to_owned) };
        let reply = self.ask::<CanI>(&Nothing {}, &query).await?;
        if !reply.allowed {
            return Err(Problem::new(ProblemCode::NotAllowed, reply.reason).into());
        }
        self.tried(summary)
    }

    /// Answers what a trial found.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn tried(&self, summary: &str) -> Result<(), Failure> {
        self.output.done(&Tried::new(summary), || summary.to_owned())
    }

    /// Does `work` until it is done or the user presses Ctrl-C, which is then told `farewell`.
    ///
    /// # Errors
    /// Those of `work`; [`Failure::Detached`] after Ctrl-C.
    pub async fn unless_interrupted<T>(
        &self,
        farewell: &str,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            result = work => result,
            () = self.interrupted() => {
                self.output.error(farewell);
                Err(Failure::Detached)
            }
        }
    }

    async fn interrupted(&self) {
        match &self.interrupt {
            Interrupt::Signal => {
                if tokio::signal::ctrl_c().await.is_err() {
                    // Without a handler the signal ends the process, which is as good.
                    std::future::pending::<()>().await;
                }
            }
            Interrupt::Given(notify) => notify.notified().await,
        }
    }
}

/// What a trial answers to programs.
#[derive(Debug, Serialize)]
struct Tried<'a> {
    dry_run: bool,
    summary: &'a str,
}

impl<'a> Tried<'a> {
    /// A trial of this.
    const fn new(summary: &'a str) -> Self {
        Self { dry_run: true, summary }
    }
}

#[cfg(test)]
mod tests;
