//! Read-only questions from a command's side: to the daemon where one owns the store, else answered in this process,
//! which then holds the store's lock until the session is dropped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::connection::{Connection, Part, ShowWaiting, Waiting};
use super::engine::Engine;
use super::protocol::{Given, Outcome, Request, WAITING_INTERVAL};
use super::query::{PIECES_WAITING_MAX, Query, Serving, answer, passes_of};
use crate::config::Loaded;
use crate::error::{Error, Result};
use crate::fetch::PassProgress;
use crate::store::lock::Lock;

/// How often a lock that another short command holds is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// After how long the user is told what is waited for.
const NOTICE_AFTER: Duration = Duration::from_secs(1);
/// How many daemons may die over one question: the next one would too.
const DEATHS_MAX: u32 = 2;

/// Someone who answers questions. Where this process works on the store itself, it holds it until [`Self::close`].
#[derive(Debug)]
pub struct Session {
    loaded: Loaded,
    notice: fn(&str),
    show: ShowWaiting,
    own: Mutex<Option<Arc<Engine>>>,
}

/// How passing a question on ended.
enum Passed {
    Outcome(Outcome),
    /// The daemon died at work before it gave a piece of the answer: somebody else can be asked.
    Death(Error),
}

enum Answering {
    Daemon(Connection),
    Here(Arc<Engine>),
}

impl Session {
    /// A session with these settings. `notice` shows a line to the user.
    #[must_use]
    pub fn new(loaded: &Loaded, notice: fn(&str)) -> Self {
        Self {
            loaded: loaded.clone(),
            notice,
            show: |_| {},
            own: Mutex::new(None),
        }
    }

    /// The same with someone who shows which layers are being read as a whole while an answer waits for them.
    #[must_use]
    pub fn showing(self, show: fn(&[PassProgress])) -> Self {
        Self { show, ..self }
    }

    /// Asks for a JSON document, and closes the session.
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

    /// Asks for bytes, which `write` takes piece by piece, and closes the session.
    ///
    /// # Errors
    /// What the answer says, what `write` says, or why there is no answer.
    pub async fn stream(&self, query: Query, mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (sender, mut pieces) = mpsc::channel::<Vec<u8>>(PIECES_WAITING_MAX);
        let consume = async {
            while let Some(bytes) = pieces.recv().await {
                write(&bytes)?;
            }
            Ok(())
        };
        let result = tokio::try_join!(self.answer(query, sender), consume).map(drop);
        self.close().await;
        result
    }

    /// Asks for bytes, which go to `to` piece by piece. Several questions may be asked at the same time.
    ///
    /// # Errors
    /// What the answer says, or why there is none; [`Error::Interrupted`] if nobody takes the pieces.
    pub async fn answer(&self, query: Query, to: mpsc::Sender<Vec<u8>>) -> Result<()> {
        query.check()?;
        let mut started = Instant::now();
        let mut deaths = 0;
        loop {
            match self.answering(&query, started).await? {
                Answering::Here(engine) => return self.answer_here(&engine, query, &to).await,
                Answering::Daemon(connection) => match self
                    .pass_on(connection.showing(self.show), &query, &to)
                    .await?
                {
                    Passed::Outcome(Outcome::Done) => return Ok(()),
                    Passed::Outcome(Outcome::Failed(error)) => return Err(error),
                    Passed::Outcome(Outcome::Ending) if started.elapsed() > self.loaded.config.timeout => {
                        return Err(Error::busy("daemon", "it answers nothing"));
                    }
                    Passed::Outcome(Outcome::Ending) => tokio::time::sleep(RETRY_INTERVAL).await,
                    Passed::Death(error) if deaths == DEATHS_MAX => return Err(error),
                    Passed::Death(_) => {
                        deaths += 1;
                        started = Instant::now();
                    }
                },
            }
        }
    }

    async fn answer_here(
        &self,
        engine: &Arc<Engine>,
        query: Query,
        to: &mpsc::Sender<Vec<u8>>,
    ) -> Result<()> {
        let repository = query.repository();
        let mut waiting = Waiting::new(self.show);
        let mut answering = std::pin::pin!(answer(
            engine.images(),
            Serving::Nobody,
            || status(engine),
            query,
            to
        ));
        loop {
            if let Ok(result) = timeout(WAITING_INTERVAL, &mut answering).await {
                return result;
            }
            if let Some(repository) = &repository {
                waiting.tell(&passes_of(engine.images(), repository));
            }
        }
    }

    /// Gives the store free, if this process holds it.
    pub async fn close(&self) {
        if let Some(engine) = self.own.lock().await.take() {
            engine.log_requests();
            engine.close();
        }
    }

    /// Finds who answers. Whoever holds the lock without listening is a command that soon ends, or a daemon that just
    /// starts.
    async fn answering(&self, query: &Query, started: Instant) -> Result<Answering> {
        let config = &self.loaded.config;
        let mut own = self.own.lock().await;
        let mut noticed = false;
        loop {
            if let Some(engine) = &*own {
                return Ok(Answering::Here(Arc::clone(engine)));
            }
            if let Some(connection) = Connection::to_store(&config.cache_dir).await? {
                tracing::info!(store = %config.cache_dir.display(), "asking the daemon of the store");
                return Ok(Answering::Daemon(connection));
            }
            let (what, why) = match Lock::take(&config.cache_dir) {
                Ok(lock) => {
                    tracing::info!(store = %config.cache_dir.display(), "answering from the store, which no daemon has");
                    let host = query.host();
                    let engine = Engine::open(config, lock, host.as_deref(), &Handle::current())?;
                    *own = Some(Arc::new(engine));
                    continue;
                }
                Err(Error::Busy { what, why }) => (what, why),
                Err(error) => return Err(error),
            };
            if started.elapsed() > config.timeout {
                let remedy = "ask again when that is done, or use another --cache-dir";
                return Err(Error::busy(what, format!("{why}; {remedy}")));
            }
            if !noticed && started.elapsed() > NOTICE_AFTER {
                (self.notice)(&format!("waiting: {what}: {why}"));
                noticed = true;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    async fn pass_on(
        &self,
        mut connection: Connection,
        query: &Query,
        to: &mpsc::Sender<Vec<u8>>,
    ) -> Result<Passed> {
        let request = Request::Query {
            query: query.clone(),
            given: Given::new(&self.loaded.given),
        };
        connection.send(&request).await?;
        let mut has_begun = false;
        loop {
            match connection.next().await {
                Ok(Part::Piece(bytes)) => {
                    has_begun = true;
                    to.send(bytes).await.map_err(|_| Error::Interrupted)?;
                }
                Ok(Part::Outcome(outcome)) => return Ok(Passed::Outcome(outcome)),
                Err(error @ Error::Busy { .. }) if !has_begun => return Ok(Passed::Death(error)),
                Err(error) => return Err(error),
            }
        }
    }
}

/// The state of a store that no daemon has.
fn status(engine: &Engine) -> serde_json::Value {
    let mut fields = engine.status();
    fields.insert("cache".to_owned(), engine.cache_usage());
    fields.insert("daemon".to_owned(), serde_json::Value::Null);
    fields.insert("mounts".to_owned(), serde_json::json!([]));
    fields.insert("errors".to_owned(), serde_json::json!([]));
    fields.into()
}

#[cfg(test)]
mod tests {
    use tokio::net::{UnixListener, UnixStream};

    use super::*;
    use crate::config::{Config, Environment, Layer};
    use crate::daemon::protocol::Frame;

    /// Takes a question and shows that it is at work.
    async fn begin(listener: &UnixListener) -> UnixStream {
        let (mut stream, _) = listener.accept().await.unwrap();
        Frame::read(&mut stream).await.unwrap().unwrap();
        Frame::Alive.write(&mut stream).await.unwrap();
        stream
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_dies_at_work_is_replaced_unless_all_do() {
        let dir = tempfile::tempdir().unwrap();
        let cache_dir = dir.path().join("cache");
        let environment = Environment {
            variables: [("REGISTRYFS_CACHE_DIR".into(), cache_dir.clone().into())].into(),
            is_root: false,
            system_file: dir.path().join("none"),
        };
        let loaded = Config::load(&environment, None, Layer::default()).unwrap();
        let socket = dir.path().join("s");
        let lock = Lock::take(&cache_dir).unwrap();
        lock.note(Some(&socket)).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let session = Session::new(&loaded, |_| {});

        let all_die = async {
            for _ in 0..=DEATHS_MAX {
                drop(begin(&listener).await);
            }
        };
        let (answer, ()) = tokio::join!(session.ask::<serde_json::Value>(Query::Status), all_die);
        assert!(matches!(answer, Err(Error::Busy { .. })), "{answer:?}");

        let dies = async move {
            let stream = begin(&listener).await;
            drop(listener);
            drop(lock);
            drop(stream);
        };
        let (answer, ()) = tokio::join!(session.ask::<serde_json::Value>(Query::Status), dies);
        assert_eq!(
            answer.unwrap()["daemon"],
            serde_json::Value::Null,
            "answered here"
        );
    }
}
