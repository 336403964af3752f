//! Credential helpers as a source: each is started once however many wait for what it says, which is then remembered
//! for a while. That a helper failed is remembered too, so that a hundred requests do not start a hundred helpers
//! that hang.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};

use super::places::CredentialEnvironment;
use super::process::{Said, ask};

/// How long a helper may take, its wait for a turn included. A lookup in the mount waits for 10 s.
const HELPER_WITHIN: Duration = Duration::from_secs(8);
/// For so long a helper is not asked again, whatever it said and whoever doubts it.
pub(super) const SAID_FOR_MIN: Duration = Duration::from_secs(5);
/// For so long an answer is good that nobody doubts.
pub(super) const SAID_FOR_MAX: Duration = Duration::from_secs(300);
/// Helpers that run at the same time.
const RUNNING_MAX: usize = 8;
/// Answers that are remembered: one for each registry that is asked for.
const REMEMBERED_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// What a helper said, and when.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    pub(super) said: Said,
    pub(super) at: Instant,
}

/// Name and server.
type Question = (String, String);
type Flight = watch::Receiver<Option<Heard>>;

/// The helpers, and what they said last.
pub(super) struct Helpers {
    environment: Arc<CredentialEnvironment>,
    flights: Mutex<LruCache<Question, Flight>>,
    turns: Arc<Semaphore>,
}

impl Helpers {
    pub(super) fn new(environment: CredentialEnvironment) -> Self {
        Self {
            environment: Arc::new(environment),
            flights: Mutex::new(LruCache::new(REMEMBERED_MAX)),
            turns: Arc::new(Semaphore::new(RUNNING_MAX)),
        }
    }

    /// What the helper `name` says about `server`. An answer is taken from memory for [`SAID_FOR_MAX`], one that is in
    /// doubt or a failure for [`SAID_FOR_MIN`].
    pub(super) async fn ask(&self, name: &str, server: &str, in_doubt: bool) -> Heard {
        let mut flight = self.flight(name, server, in_doubt);
        let heard = match flight.wait_for(Option::is_some).await {
            Ok(heard) => heard.clone(),
            Err(_) => None,
        };
        heard.unwrap_or_else(|| Heard {
            said: Said::Failed("could not be asked".to_owned()),
            at: Instant::now(),
        })
    }

    /// Forgets all answers; who waits for one gets it.
    pub(super) fn forget(&self) {
        self.flights.lock().clear();
    }

    fn flight(&self, name: &str, server: &str, in_doubt: bool) -> Flight {
        let question = (name.to_owned(), server.to_owned());
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&question)
            && is_good(flight, in_doubt)
        {
            return flight.clone();
        }
        let (sender, flight) = watch::channel(None);
        flights.put(question.clone(), flight.clone());
        let (environment, turns) = (Arc::clone(&self.environment), Arc::clone(&self.turns));
        // A task of its own: whoever asked first may go away, the others still wait.
        tokio::spawn(async move {
            let said = in_turn(&environment, &turns, &question).await;
            if let Said::Failed(why) = &said {
                tracing::warn!(helper = %question.0, server = %question.1, "the credential helper {why}");
            }
            sender.send_replace(Some(Heard {
                said,
                at: Instant::now(),
            }));
        });
        flight
    }
}

/// Whether an answer, come or still to come, will do.
fn is_good(flight: &Flight, in_doubt: bool) -> bool {
    let heard = flight.borrow();
    let Some(heard) = heard.as_ref() else {
        // A task that ended without a word will say nothing more.
        return flight.has_changed().is_ok();
    };
    let failed = matches!(heard.said, Said::Failed(_));
    let good_for = if failed || in_doubt {
        SAID_FOR_MIN
    } else {
        SAID_FOR_MAX
    };
    heard.at.elapsed() < good_for
}

async fn in_turn(environment: &CredentialEnvironment, turns: &Semaphore, (name, server): &Question) -> Said {
    let began = Instant::now();
    let Ok(Ok(_turn)) = timeout(HELPER_WITHIN, turns.acquire()).await else {
        return Said::Failed(format!("had to wait for {RUNNING_MAX} others that hang"));
    };
    let within = HELPER_WITHIN.saturating_sub(began.elapsed());
    ask(environment, name, server, within).await
}
