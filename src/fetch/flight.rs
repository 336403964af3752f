//! Single flight: who fetches which member now, and who waits for it.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::store::layer::Layer;

type Outcome = Option<Result<()>>;
type Table = Mutex<HashMap<(Digest, u32), watch::Receiver<Outcome>>>;
/// Resolves when the member has arrived, or failed.
pub(super) type Arrival = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// A member that is waited for.
pub(super) struct Waiter {
    pub(super) member: u32,
    pub(super) arrival: Arrival,
    /// Whether somebody else fetches it, who may have another source for it.
    pub(super) foreign: bool,
}

/// The members being fetched, by layer and number.
#[derive(Debug, Default)]
pub(super) struct Flights(Arc<Table>);

/// A member that the holder has to fetch. Dropping it ends the flight: without [`Landing::done`], as a failure.
#[derive(Debug)]
pub(super) struct Landing {
    table: Arc<Table>,
    layer: Digest,
    member: u32,
    sender: watch::Sender<Outcome>,
    /// Receivers that nobody waits with: the table's, and that of who only brings it ahead.
    disregarded: usize,
}

impl Landing {
    pub(super) fn member(&self) -> u32 {
        self.member
    }

    /// Whether anybody waits for it.
    pub(super) fn is_awaited(&self) -> bool {
        self.sender.receiver_count() > self.disregarded
    }

    /// One of those who wait for it needs it for nothing.
    pub(super) fn disregard_one(&mut self) {
        self.disregarded += 1;
    }

    /// Tells whoever waits. What arrived must have been marked before: the next reader looks at the marks under the
    /// table's lock.
    pub(super) fn done(self, outcome: Result<()>) {
        self.table.lock().remove(&(self.layer, self.member));
        self.sender.send_replace(Some(outcome));
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if self.sender.borrow().is_none() {
            self.table.lock().remove(&(self.layer, self.member));
        }
    }
}

/// The landings of one caller of [`Flights::join`], by member.
pub(super) type Mine = HashMap<u32, Landing>;

impl Flights {
    /// Number of members being fetched.
    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Whether a member is being fetched.
    pub(super) fn has(&self, layer: &Layer, member: u32) -> bool {
        self.0.lock().contains_key(&(*layer.key(), member))
    }

    /// Joins the flights of `needed` and opens one for each of `candidates` (a superset; both sorted) that is neither
    /// present nor under way. Presence is looked at under the lock that [`Landing::done`] takes after the marking, so
    /// nothing is fetched twice.
    pub(super) fn join(
        &self,
        layer: &Layer,
        needed: &[u32],
        candidates: &[u32],
    ) -> Result<(Vec<Waiter>, Mine)> {
        let mut waiters: Vec<Waiter> = Vec::new();
        let mut opened = Vec::new();
        {
            let mut under_way = self.0.lock();
            for &member in candidates {
                let key = (*layer.key(), member);
                let is_needed = needed.binary_search(&member).is_ok();
                if let Some(receiver) = under_way.get(&key) {
                    if is_needed {
                        waiters.push(Waiter {
                            member,
                            arrival: wait(receiver.clone()),
                            foreign: true,
                        });
                    }
                    continue;
                }
                // What was there before an unclean reboot is verified by whoever needs it, not fetched ahead.
                let here = |chunk| layer.is_present(chunk) || (!is_needed && layer.is_suspect(chunk));
                if chunks_of(layer, member).is_ok_and(|chunks| chunks.into_iter().all(here)) {
                    continue;
                }
                let (sender, receiver) = watch::channel(None);
                if is_needed {
                    waiters.push(Waiter {
                        member,
                        arrival: wait(receiver.clone()),
                        foreign: false,
                    });
                }
                under_way.insert(key, receiver);
                opened.push((member, sender));
            }
        }
        let landing = |(member, sender)| {
            let (table, layer) = (Arc::clone(&self.0), *layer.key());
            (
                member,
                Landing {
                    table,
                    layer,
                    member,
                    sender,
                    disregarded: 1,
                },
            )
        };
        Ok((waiters, opened.into_iter().map(landing).collect()))
    }
}

fn chunks_of(layer: &Layer, member: u32) -> Result<Vec<u32>> {
    layer.index().member_chunks(&layer.index().member(member)?)
}

fn wait(mut receiver: watch::Receiver<Outcome>) -> Arrival {
    Box::pin(async move {
        let gone = || Error::Io {
            what: "fetch".to_owned(),
            errno: libc::EIO,
            why: "the request was given up".to_owned(),
        };
        let outcome = receiver.wait_for(Option::is_some).await.map_err(|_| gone())?;
        outcome.clone().unwrap_or_else(|| Err(gone()))
    })
}
