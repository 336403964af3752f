//! One piece of work for all who want its result at the same time.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::error::{Error, Result};

type Table<K, V> = Arc<Mutex<HashMap<K, Arc<watch::Sender<Option<Result<V>>>>>>>;

/// Work under way, by key. The work runs as a task of its own: whoever stops waiting stops nobody else.
pub struct SingleFlight<K, V>(Table<K, V>);

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K, V> fmt::Debug for SingleFlight<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SingleFlight")
            .field("under_way", &self.0.lock().len())
            .finish()
    }
}

/// Takes the key out of the table also when the work panics.
struct Entry<K: Eq + Hash, V> {
    table: Table<K, V>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Entry<K, V> {
    fn drop(&mut self) {
        self.table.lock().remove(&self.key);
    }
}

impl<K, V> SingleFlight<K, V>
where
    K: Clone + Eq + Hash + fmt::Debug + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// How many wait for the work under way for `key`.
    pub fn waiters(&self, key: &K) -> usize {
        self.0.lock().get(key).map_or(0, |sender| sender.receiver_count())
    }

    /// Joins the work under way for `key`, or starts `work` on `runtime`.
    ///
    /// # Errors
    /// What the work returns; [`Error::Io`] when it panicked.
    pub async fn run<F>(&self, runtime: &Handle, key: K, work: F) -> Result<V>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        let mut receiver = {
            let mut table = self.0.lock();
            match table.get(&key) {
                Some(sender) => sender.subscribe(),
                None => {
                    let sender = Arc::new(watch::Sender::new(None));
                    let receiver = sender.subscribe();
                    table.insert(key.clone(), Arc::clone(&sender));
                    let entry = Entry {
                        table: Arc::clone(&self.0),
                        key: key.clone(),
                    };
                    runtime.spawn(async move {
                        let outcome = work.await;
                        drop(entry);
                        sender.send_replace(Some(outcome));
                    });
                    receiver
                }
            }
        };
        let outcome = receiver
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|outcome| outcome.clone());
        outcome.unwrap_or_else(|| {
            let what = format!("{key:?}");
            Err(Error::Io {
                what,
                errno: libc::EIO,
                why: "the work broke off".to_owned(),
            })
        })
    }
}

/// Work that is done once for all who want its result at the same time or within a moment.
#[derive(Debug)]
pub struct Recent<K: Eq + Hash, V> {
    flights: SingleFlight<K, V>,
    results: Mutex<LruCache<K, (Instant, V)>>,
    ttl: Duration,
}

impl<K, V> Recent<K, V>
where
    K: Clone + Eq + Hash + fmt::Debug + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Results hold for `ttl`; at most `results_max` are kept.
    #[must_use]
    pub fn new(ttl: Duration, results_max: usize) -> Self {
        let results_max = NonZeroUsize::new(results_max).unwrap_or(NonZeroUsize::MIN);
        Self {
            flights: SingleFlight::default(),
            results: Mutex::new(LruCache::new(results_max)),
            ttl,
        }
    }

    /// As [`SingleFlight::run`], unless a result is known that holds.
    ///
    /// # Errors
    /// What the work returns, which is not kept; [`Error::Io`] when it panicked.
    pub async fn get<F>(&self, runtime: &Handle, key: K, work: F) -> Result<V>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        if let Some((at, result)) = self.results.lock().get(&key)
            && at.elapsed() < self.ttl
        {
            return Ok(result.clone());
        }
        let result = self.flights.run(runtime, key.clone(), work).await?;
        self.results.lock().put(key, (Instant::now(), result.clone()));
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn work_is_done_once_and_goes_on_without_those_who_left() {
        let flights: SingleFlight<&str, usize> = SingleFlight::default();
        let runs = Arc::new(AtomicUsize::new(0));
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        let work = || {
            let (runs, gate) = (Arc::clone(&runs), Arc::clone(&gate));
            async move {
                let _opened = gate.acquire().await;
                Ok(runs.fetch_add(1, Ordering::SeqCst) + 1)
            }
        };
        let runtime = Handle::current();
        let impatient = flights.run(&runtime, "key", work());
        assert!(
            tokio::time::timeout(std::time::Duration::from_millis(1), impatient)
                .await
                .is_err()
        );
        assert_eq!(flights.waiters(&"key"), 0, "it goes on alone");
        let patient = flights.run(&runtime, "key", work());
        // `join!` polls in order: the patient one has joined when the gate opens.
        let (joined, ()) = tokio::join!(patient, async { gate.add_permits(1) });
        assert_eq!(joined, Ok(1));
        assert_eq!(
            flights.run(&runtime, "key", work()).await,
            Ok(2),
            "the next one starts anew"
        );
    }

    #[tokio::test]
    async fn a_result_holds_for_a_moment_and_a_failure_does_not() {
        let runs = Arc::new(AtomicUsize::new(0));
        let runtime = Handle::current();
        let work = |outcome: Result<()>| {
            let runs = Arc::clone(&runs);
            async move {
                let run = runs.fetch_add(1, Ordering::SeqCst);
                outcome.map(|()| run)
            }
        };
        let recent = Recent::new(Duration::from_secs(3600), 2);
        let refused = Error::not_found("it", "not today");
        assert_eq!(
            recent.get(&runtime, 1, work(Err(refused.clone()))).await,
            Err(refused)
        );
        assert_eq!(recent.get(&runtime, 1, work(Ok(()))).await, Ok(1));
        assert_eq!(recent.get(&runtime, 1, work(Ok(()))).await, Ok(1), "known");
        assert_eq!(recent.get(&runtime, 2, work(Ok(()))).await, Ok(2), "another");
        let short = Recent::new(Duration::ZERO, 2);
        assert_eq!(short.get(&runtime, 1, work(Ok(()))).await, Ok(3));
        assert_eq!(short.get(&runtime, 1, work(Ok(()))).await, Ok(4), "over");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_panic_is_an_error_once() {
        let flights: SingleFlight<&str, ()> = SingleFlight::default();
        let runtime = Handle::current();
        let broken = async {
            tokio::task::yield_now().await;
            let none: Option<()> = None;
            none.ok_or(()).unwrap();
            Ok(())
        };
        assert!(flights.run(&runtime, "key", broken).await.is_err());
        assert_eq!(flights.run(&runtime, "key", async { Ok(()) }).await, Ok(()));
    }
}
