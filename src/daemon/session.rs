//! Read-only questions from a command's side: to the daemon where one owns the store, else answered in this process,
//! which then holds the store's lock until the session is dropped.

use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::connection::{Connection, Part};
use super::engine::Engine;
use super::protocol::{Given, Outcome, Request};
use super::query::{PIECES_WAITING_MAX, Query, answer};
use crate::config::Loaded;
use crate::error::{Error, Result};
use crate::store::lock::Lock;

/// How often a lock that another short command holds is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// After how long the user is told what is waited for.
const NOTICE_AFTER: Duration = Duration::from_secs(1);

/// Someone who answers questions, each found anew.
#[derive(Debug)]
pub struct Session<'a> {
    loaded: &'a Loaded,
    notice: fn(&str),
}

enum Answering {
    Daemon(Connection),
    Here(Box<Engine>),
}

impl<'a> Session<'a> {
    /// A session with these settings. `notice` shows a line to the user.
    #[must_use]
    pub fn new(loaded: &'a Loaded, notice: fn(&str)) -> Self {
        Self { loaded, notice }
    }

    /// Asks for a JSON document.
    ///
    /// # Errors
    /// What the answer says, or why there is none.
    pub async fn ask<T: DeserializeOwned>(&self, query: Query) -> Result<T> {
        let mut document = Vec::new();
        self.stream(query, |bytes| {
            document.extend_from_slice(bytes);
            Ok(())
        })
        .await?;
        serde_json::from_slice(&document).map_err(|error| Error::malformed("answer", error.to_string()))
    }

    /// Asks for bytes, which `write` takes piece by piece.
    ///
    /// # Errors
    /// What the answer says, what `write` says, or why there is no answer.
    pub async fn stream(&self, query: Query, mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        query.check()?;
        let started = Instant::now();
        loop {
            match self.answering(&query, started).await? {
                Answering::Here(engine) => return stream_here(&engine, query, write).await,
                Answering::Daemon(connection) => {
                    match self.stream_from(connection, &query, &mut write).await? {
                        Outcome::Done => return Ok(()),
                        Outcome::Failed(error) => return Err(error),
                        Outcome::Ending if started.elapsed() > self.loaded.config.timeout => {
                            return Err(Error::busy("daemon", "it answers nothing"));
                        }
                        Outcome::Ending => tokio::time::sleep(RETRY_INTERVAL).await,
                    }
                }
            }
        }
    }

    /// Finds who answers. Whoever holds the lock without listening is a command that soon ends, or a daemon that just
    /// starts.
    async fn answering(&self, query: &Query, started: Instant) -> Result<Answering> {
        let config = &self.loaded.config;
        let mut noticed = false;
        loop {
            if let Some(connection) = Connection::to_store(&config.cache_dir).await? {
                tracing::info!(store = %config.cache_dir.display(), "asking the daemon of the store");
                return Ok(Answering::Daemon(connection));
            }
            let busy = match Lock::take(&config.cache_dir) {
                Ok(lock) => {
                    tracing::info!(store = %config.cache_dir.display(), "answering from the store, which no daemon has");
                    let host = query.host();
                    return Engine::open(config, lock, host.as_deref(), &Handle::current())
                        .map(|engine| Answering::Here(Box::new(engine)));
                }
                Err(busy @ Error::Busy { .. }) => busy,
                Err(error) => return Err(error),
            };
            if started.elapsed() > config.timeout {
                return Err(busy);
            }
            if !noticed && started.elapsed() > NOTICE_AFTER {
                (self.notice)(&format!("waiting: {busy}"));
                noticed = true;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    async fn stream_from(
        &self,
        mut connection: Connection,
        query: &Query,
        write: &mut impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<Outcome> {
        let request = Request::Query {
            query: query.clone(),
            given: Given::new(&self.loaded.given),
        };
        connection.send(&request).await?;
        loop {
            match connection.next().await? {
                Part::Piece(bytes) => write(&bytes)?,
                Part::Outcome(outcome) => return Ok(outcome),
            }
        }
    }
}

async fn stream_here(
    engine: &Engine,
    query: Query,
    mut write: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let (sender, mut pieces) = mpsc::channel(PIECES_WAITING_MAX);
    let status = || {
        let mut fields = engine.status();
        fields.insert("cache".to_owned(), engine.cache_usage());
        fields.insert("daemon".to_owned(), serde_json::Value::Null);
        fields.insert("mounts".to_owned(), serde_json::json!([]));
        fields.insert("errors".to_owned(), serde_json::json!([]));
        fields.into()
    };
    let produce = async {
        let result = answer(engine.images(), status, query, &sender).await;
        drop(sender);
        result
    };
    let consume = async {
        while let Some(bytes) = pieces.recv().await {
            write(&bytes)?;
        }
        Ok(())
    };
    let result = tokio::try_join!(produce, consume).map(drop);
    engine.log_requests();
    engine.close();
    result
}
