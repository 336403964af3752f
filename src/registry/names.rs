//! Looking up the names of hosts, for the connections that go out from here. A first read of an image makes one connection for
//! each layer, and 64 readers make many more: a name is looked up once for all that are made together, and not between two of
//! a host that were just made. Where the system remembers nothing itself, each look-up costs a round trip to its name server.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::time::Instant;

/// How long addresses are used again: shorter than any name server takes to change what it says.
const GOOD_FOR: Duration = Duration::from_secs(5);
/// The most names whose addresses are kept.
const NAMES_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// What the system said of a name, and when. The lock is held by who asks it; the others wait for that.
type Found = Arc<tokio::sync::Mutex<Option<(Instant, Answer)>>>;
/// The addresses of a name, or what kept them from being found.
type Answer = Result<Vec<SocketAddr>, (io::ErrorKind, String)>;

/// Addresses that were just found.
#[derive(Debug)]
struct Recent(Mutex<LruCache<String, Found>>);

static RECENT: LazyLock<Recent> = LazyLock::new(|| Recent(Mutex::new(LruCache::new(NAMES_MAX))));

impl Recent {
    /// The addresses of `name`, which `look_up` finds. What it fails with is for all who waited for that, or they would fail one
    /// after the other, each after a wait of its own; whoever comes later asks anew.
    async fn addresses<L: Future<Output = io::Result<Vec<SocketAddr>>>>(
        &self,
        name: &str,
        look_up: impl FnOnce() -> L,
    ) -> io::Result<Vec<SocketAddr>> {
        let asked_at = Instant::now();
        let found = Arc::clone(self.0.lock().get_or_insert_mut(name.to_owned(), Found::default));
        let mut found = found.lock().await;
        let is_of_use = |(at, answer): &(Instant, Answer)| match answer {
            Ok(_) => at.elapsed() < GOOD_FOR,
            Err(_) => *at > asked_at,
        };
        let (_, answer) = match found.take().filter(is_of_use) {
            Some(known) => found.insert(known),
            None => {
                let answer = look_up().await.map_err(|error| (error.kind(), error.to_string()));
                found.insert((Instant::now(), answer))
            }
        };
        answer.clone().map_err(|(kind, why)| io::Error::new(kind, why))
    }
}

/// Asks the system for names, but not for what it has just said.
#[derive(Debug, Clone, Copy)]
pub(super) struct System;

impl Resolve for System {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let look_up = || async { Ok(tokio::net::lookup_host((name.as_str(), 0)).await?.collect()) };
            let addresses = RECENT.addresses(name.as_str(), look_up).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn recent() -> Recent {
        Recent(Mutex::new(LruCache::new(NAMES_MAX)))
    }

    #[tokio::test]
    async fn a_name_is_looked_up_once_for_all_who_ask_together_and_soon_after() {
        let (recent, looks) = (recent(), AtomicU32::new(0));
        let ask = |name: &'static str| {
            recent.addresses(name, || async {
                tokio::task::yield_now().await;
                let port = u16::try_from(looks.fetch_add(1, Ordering::Relaxed)).unwrap();
                Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))])
            })
        };
        let (first, second) = tokio::join!(ask("a"), ask("a"));
        assert_eq!(
            (first.unwrap(), looks.load(Ordering::Relaxed)),
            (second.unwrap(), 1)
        );
        assert_ne!(ask("a").await.unwrap(), ask("b").await.unwrap());
        assert_eq!(looks.load(Ordering::Relaxed), 2);
        let found = Arc::clone(recent.0.lock().get("a").unwrap());
        if let Some((at, _)) = &mut *found.lock().await {
            *at = at.checked_sub(GOOD_FOR).unwrap();
        }
        ask("a").await.unwrap();
        assert_eq!(looks.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn all_who_wait_for_a_name_that_is_not_found_are_told_at_once_and_who_comes_later_asks_again() {
        let (recent, address) = (recent(), SocketAddr::from(([127, 0, 0, 1], 1)));
        let looks = AtomicU32::new(0);
        let ask = || {
            recent.addresses("a", || async {
                looks.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                Err(io::Error::new(io::ErrorKind::NotFound, "no such name"))
            })
        };
        let (first, second, third) = tokio::join!(ask(), ask(), ask());
        for failed in [first, second, third] {
            let error = failed.unwrap_err();
            assert_eq!(
                (error.kind(), error.to_string().as_str()),
                (io::ErrorKind::NotFound, "no such name")
            );
        }
        assert_eq!(looks.load(Ordering::Relaxed), 1);
        let found = recent.addresses("a", || async { Ok(vec![address]) });
        assert_eq!(found.await.unwrap(), [address]);
    }
}
