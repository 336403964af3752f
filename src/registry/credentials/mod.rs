//! Who we are to a registry. What the user gave for it comes first, then the files that other tools log in to
//! (`places`, `file`), which may leave the answer to credential helpers (`helpers`, `process`). The first source that
//! has something for the repository is taken.
//!
//! Nothing is kept but the answers in use. They are good for as long as the files look unchanged, which is looked at
//! once a second at most while nobody doubts them; a refusal by a registry is a reason to doubt. So a login or a logout
//! by another tool is noticed at the next request, and a request costs no system call.
//!
//! A file that is broken is passed over, and every message names it: public images stay readable. A helper that fails
//! is an error: it was set up to be asked, and the tools that people know from elsewhere fail there too.

mod file;
mod helpers;
mod places;
mod process;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::Instant;

use self::file::{Candidate, Content, Stamp};
use self::helpers::{Helpers, SAID_FOR_MAX, SAID_FOR_MIN};
use self::places::Place;
use self::process::Said;
use super::options::ClientOptions;
use super::secret::Secret;

pub(super) use self::file::parse;
pub use self::places::CredentialEnvironment;
pub(super) use self::places::Kind;

/// How the user gave the credentials that no file holds.
const GIVEN: &str = "--credential (or REGISTRYFS_CREDENTIAL)";
/// The user name that says that the password is an identity token (docker's credential helpers).
const TOKEN_USER: &str = "<token>";
/// Answers that are remembered: one for each repository in use.
const KNOWN_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// How often the files are looked at while nobody doubts what they said.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Who we are to a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Identity {
    /// Nobody.
    Anonymous,
    /// A user with a password.
    Password { user: String, password: Secret },
    /// A refresh token for the token service, and the password for one that takes none.
    Refresh {
        user: String,
        token: Secret,
        password: Option<Secret>,
    },
    /// A token that the registry itself takes.
    Bearer(Secret),
}

/// User and password, or what docker's helpers mean by such.
fn password_identity(user: &str, password: &str) -> Identity {
    let secret = Secret::new(password);
    if user == TOKEN_USER {
        return Identity::Refresh {
            user: user.to_owned(),
            token: secret,
            password: None,
        };
    }
    Identity::Password {
        user: user.to_owned(),
        password: secret,
    }
}

/// An identity, and where it was found or looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) identity: Identity,
    /// Tells these credentials from others: what was got with them is filed under it. It means nothing outside of
    /// this process.
    pub(super) fingerprint: u64,
    source: String,
    /// What could not be used on the way to it.
    passed_over: Vec<String>,
}

impl Credentials {
    /// Nobody's.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self {
            identity: Identity::Anonymous,
            fingerprint: 0,
            source: String::new(),
            passed_over: Vec::new(),
        }
    }

    /// A sentence part for the user: which credentials were used, or why there are none. Never the secret.
    pub(super) fn describe(&self) -> String {
        let mut text = match self.identity {
            Identity::Anonymous => format!("no credentials: {}", self.source),
            _ => format!("credentials of {}", self.source),
        };
        for problem in &self.passed_over {
            text.push_str("; passed over ");
            text.push_str(problem);
        }
        text
    }

    /// [`Self::describe`] for `status`, which names only what was sent.
    pub(super) fn sent(&self) -> Option<String> {
        (self.identity != Identity::Anonymous).then(|| self.describe())
    }
}

/// Why credentials could not be looked up, for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure(pub(super) String);

/// All places where credentials may be, and what they said.
pub(super) struct Sources {
    options: Arc<ClientOptions>,
    places: Vec<Place>,
    helpers: Helpers,
    hasher: RandomState,
    state: Mutex<State>,
    /// Held by whoever looks at the files.
    turn: tokio::sync::Mutex<()>,
}

/// Registry and repository; an empty repository is the registry as such.
type Key = (String, String);

struct State {
    stamps: Vec<Stamp>,
    /// Counts the changes of the files.
    generation: u64,
    looked_at: Option<Instant>,
    known: LruCache<Key, Known>,
    warned: Vec<String>,
}

#[derive(Clone)]
struct Known {
    found: Arc<Credentials>,
    generation: u64,
    until: Instant,
    in_doubt: bool,
}

/// What the files say about a repository.
struct Plan {
    generation: u64,
    /// Each with the file that it is in.
    candidates: Vec<(PathBuf, Candidate)>,
    passed_over: Vec<String>,
    /// The files that are there, without a word about the repository.
    silent: Vec<PathBuf>,
    absent: Vec<PathBuf>,
}

enum Look {
    Unchanged(Arc<Credentials>),
    Plan(Plan),
}

impl Sources {
    pub(super) fn new(options: &Arc<ClientOptions>) -> Arc<Self> {
        let places = options.credential_environment.places();
        Arc::new(Self {
            options: Arc::clone(options),
            helpers: Helpers::new(options.credential_environment.clone()),
            hasher: RandomState::new(),
            state: Mutex::new(State {
                stamps: places.iter().map(|_| Stamp::Absent).collect(),
                generation: 0,
                looked_at: None,
                known: LruCache::new(KNOWN_MAX),
                warned: Vec::new(),
            }),
            places,
            turn: tokio::sync::Mutex::new(()),
        })
    }

    /// The credentials for the repository `path` (empty: the registry as such) of the registry `host`, a canonical
    /// name. What is remembered is looked up anew if it is `in_doubt`.
    ///
    /// # Errors
    /// A [`Failure`] naming the credential helper that failed.
    pub(super) async fn find(
        self: &Arc<Self>,
        host: &str,
        path: &str,
        in_doubt: bool,
    ) -> Result<Arc<Credentials>, Failure> {
        if let Some(given) = self.given(host) {
            return Ok(Arc::new(given));
        }
        let key = (host.to_owned(), path.to_owned());
        if !in_doubt && let Some(found) = self.remembered(&key) {
            return Ok(found);
        }
        let turn = self.turn.lock().await;
        let in_doubt = in_doubt
            || self
                .state
                .lock()
                .known
                .peek(&key)
                .is_some_and(|known| known.in_doubt);
        if !in_doubt && let Some(found) = self.remembered(&key) {
            return Ok(found);
        }
        // Files do not belong on an async thread.
        let (sources, asked) = (Arc::clone(self), key.clone());
        let look = tokio::task::spawn_blocking(move || sources.look(&asked, in_doubt)).await;
        drop(turn);
        match look {
            Ok(Look::Unchanged(found)) => Ok(found),
            Ok(Look::Plan(plan)) => self.follow(key, plan, in_doubt).await,
            Err(_) => Err(Failure("looking for credentials failed".to_owned())),
        }
    }

    /// What is remembered for that repository did not help: it is looked up anew before its next use.
    pub(super) fn doubt(&self, host: &str, path: &str) {
        let key = (host.to_owned(), path.to_owned());
        if let Some(known) = self.state.lock().known.peek_mut(&key) {
            known.in_doubt = true;
        }
    }

    fn given(&self, host: &str) -> Option<Credentials> {
        let own = self.options.hosts.get(host);
        let own = own.and_then(|options| options.credential.as_ref());
        let secret = own.or(self.options.credential.as_ref())?;
        Some(match secret.expose().split_once(':') {
            Some((user, password)) => {
                self.credentials(password_identity(user, password), GIVEN.to_owned(), Vec::new())
            }
            None => {
                let source = format!("{GIVEN} is not of the form USER:PASS");
                self.credentials(Identity::Anonymous, source, Vec::new())
            }
        })
    }

    fn credentials(&self, identity: Identity, source: String, passed_over: Vec<String>) -> Credentials {
        let fingerprint = match identity {
            // However often the reason changes, nobody stays nobody.
            Identity::Anonymous => 0,
            _ => self.hasher.hash_one((&identity, &source)),
        };
        Credentials {
            identity,
            fingerprint,
            source,
            passed_over,
        }
    }

    fn remembered(&self, key: &Key) -> Option<Arc<Credentials>> {
        let mut state = self.state.lock();
        state.looked_at.filter(|at| at.elapsed() < LOOK_INTERVAL)?;
        state.unchanged(key)
    }

    /// Looks at the files, and reads them if what is remembered will not do. Blocks.
    fn look(&self, key: &Key, in_doubt: bool) -> Look {
        let stamps: Vec<Stamp> = self.places.iter().map(|place| Stamp::of(&place.path)).collect();
        let now = SystemTime::now();
        let unsettled = stamps.iter().any(|stamp| stamp.is_unsettled(now));
        let generation = {
            let mut state = self.state.lock();
            let changed = state.stamps != stamps;
            if changed && state.looked_at.is_some() {
                // Logging in through a helper writes to its file, too.
                self.helpers.forget();
            }
            if changed || unsettled {
                state.generation += 1;
            }
            state.stamps = stamps;
            state.looked_at = Some(Instant::now());
            if !in_doubt && let Some(found) = state.unchanged(key) {
                return Look::Unchanged(found);
            }
            state.generation
        };
        let plan = self.read(key, generation);
        let mut state = self.state.lock();
        let broken = plan.passed_over.clone();
        for problem in broken.iter().filter(|problem| !state.warned.contains(problem)) {
            tracing::warn!("credentials: passed over {problem}");
        }
        state.warned = broken;
        Look::Plan(plan)
    }

    fn read(&self, (host, path): &Key, generation: u64) -> Plan {
        let mut plan = Plan {
            generation,
            candidates: Vec::new(),
            passed_over: Vec::new(),
            silent: Vec::new(),
            absent: Vec::new(),
        };
        for place in &self.places {
            match file::read(place) {
                Content::Absent => plan.absent.push(place.path.clone()),
                Content::Broken(why) => plan.passed_over.push(format!("{}: {why}", place.path.display())),
                Content::Entries(entries) => {
                    let candidates = entries.candidates(host, path);
                    if candidates.is_empty() {
                        plan.silent.push(place.path.clone());
                    }
                    let with_file = candidates.into_iter().map(|found| (place.path.clone(), found));
                    plan.candidates.extend(with_file);
                }
            }
        }
        plan
    }

    /// Takes the first candidate that has something.
    async fn follow(&self, key: Key, plan: Plan, in_doubt: bool) -> Result<Arc<Credentials>, Failure> {
        let host = &key.0;
        let mut until = Instant::now() + SAID_FOR_MAX;
        let mut passed_over = plan.passed_over;
        let mut silent: Vec<String> = plan
            .silent
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let mut taken = None;
        for (path, candidate) in plan.candidates {
            let shown = path.display();
            match candidate {
                Candidate::Entry { key, identity } => {
                    taken = Some((identity, format!("{shown}, entry {key}")));
                }
                Candidate::Unusable { key, why } => {
                    passed_over.push(format!("{shown}: entry {key} {why}"));
                }
                Candidate::Helper { name, server } => {
                    let heard = self.helpers.ask(&name, &server, in_doubt).await;
                    until = until.min(heard.at + SAID_FOR_MAX);
                    let program = process::program(&name);
                    match heard.said {
                        Said::Found(identity) => {
                            taken = Some((identity, format!("{program}, as {shown} says")));
                        }
                        Said::Nothing => silent.push(format!("{program} (of {shown})")),
                        Said::Failed(why) => {
                            let why = format!(
                                "the credential helper {program}, which {shown} names for {host}, {why}"
                            );
                            return self.instead_of_failure(&key, plan.generation, in_doubt, why);
                        }
                    }
                }
            }
            if taken.is_some() {
                break;
            }
        }
        let (identity, source) =
            taken.unwrap_or_else(|| (Identity::Anonymous, nowhere(host, &silent, &plan.absent)));
        let found = Arc::new(self.credentials(identity, source, passed_over));
        let known = Known {
            found: Arc::clone(&found),
            generation: plan.generation,
            until,
            in_doubt: false,
        };
        self.state.lock().known.put(key, known);
        Ok(found)
    }

    /// What a helper said before stays good while it fails, unless somebody doubts it.
    fn instead_of_failure(
        &self,
        key: &Key,
        generation: u64,
        in_doubt: bool,
        why: String,
    ) -> Result<Arc<Credentials>, Failure> {
        let mut state = self.state.lock();
        match state.known.peek_mut(key) {
            Some(known) if !in_doubt && known.generation == generation => {
                known.until = Instant::now() + SAID_FOR_MIN;
                Ok(Arc::clone(&known.found))
            }
            _ => Err(Failure(why)),
        }
    }
}

/// Why there are none for `host`: what had nothing, or which files are not there.
fn nowhere(host: &str, silent: &[String], absent: &[PathBuf]) -> String {
    if !silent.is_empty() {
        return format!("nothing for {host} in {}", silent.join(", "));
    }
    let absent: Vec<String> = absent.iter().map(|path| path.display().to_string()).collect();
    match absent.is_empty() {
        true => "there is no file of them that can be used".to_owned(),
        false => format!("there is no {}", absent.join(", no ")),
    }
}

impl State {
    /// What is remembered and still good.
    fn unchanged(&mut self, key: &Key) -> Option<Arc<Credentials>> {
        let generation = self.generation;
        let known = self.known.get(key)?;
        let good = known.generation == generation && !known.in_doubt && Instant::now() < known.until;
        good.then(|| Arc::clone(&known.found))
    }
}
