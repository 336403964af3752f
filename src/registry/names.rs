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

/// The addresses of a name and when they were found. The lock is held by who looks them up; the others wait for it.
type Found = Arc<tokio::sync::Mutex<Option<(Instant, Vec<SocketAddr>)>>>;

/// Addresses that were just found.
#[derive(Debug)]
struct Recent(Mutex<LruCache<String, Found>>);

static RECENT: LazyLock<Recent> = LazyLock::new(|| Recent(Mutex::new(LruCache::new(NAMES_MAX))));

impl Recent {
    /// The addresses of `name`, which `look_up` finds. What it fails with is for whoever asked it; the next asks anew.
    async fn addresses<L: Future<Output = io::Result<Vec<SocketAddr>>>>(
        &self,
        name: &str,
        look_up: impl FnOnce() -> L,
    ) -> io::Result<Vec<SocketAddr>> {
        let found = Arc::clone(self.0.lock().get_or_insert_mut(name.to_owned(), Found::default));
        let mut found = found.lock().await;
        if let Some((at, addresses)) = &*found
            && at.elapsed() < GOOD_FOR
        {
            return Ok(addresses.clone());
        }
        let addresses = look_up().await?;
        *found = Some((Instant::now(), addresses.clone()));
        Ok(addresses)
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
    async fn a_name_that_was_not_found_is_looked_up_again() {
        let (recent, address) = (recent(), SocketAddr::from(([127, 0, 0, 1], 1)));
        let failed = recent.addresses("a", || async { Err(io::ErrorKind::NotFound.into()) });
        assert_eq!(failed.await.unwrap_err().kind(), io::ErrorKind::NotFound);
        let found = recent.addresses("a", || async { Ok(vec![address]) });
        assert_eq!(found.await.unwrap(), [address]);
    }
}
