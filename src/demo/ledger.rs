//! The demo registry's memory of what it was asked: every request in order, with its times and bytes, so that a test
//! can say how many requests something took, and how many of them one after the other.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::behaviour::Endpoint;

/// Most requests that are remembered; the oldest are forgotten first.
const RECORDS_MAX: usize = 100_000;

/// One request.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its number, from 0 in the order of arrival; clearing the ledger does not reset it.
    pub sequence: u64,
    /// When its head had arrived, since the registry's start.
    pub started: Duration,
    /// When the last byte of its answer was handed to the connection, or the connection was given up, since the
    /// registry's start; `None` while it is being answered.
    pub ended: Option<Duration>,
    /// Whom it was for.
    pub endpoint: Endpoint,
    /// The method.
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The query, with the value of every signature replaced by `REDACTED`.
    pub query: String,
    /// The `Range` header, if any.
    pub range: Option<String>,
    /// The status of the answer, 0 when there was none.
    pub status: u16,
    /// Bytes of the answer's body that were handed to the connection.
    pub body_bytes: u64,
    /// Whether it came with an `Authorization` header.
    pub had_authorization: bool,
}

/// What all requests for one path come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Requests.
    pub requests: u64,
    /// Bytes of the answers' bodies.
    pub body_bytes: u64,
}

/// The most requests of `records` that can be put in a row so that each began after the one before had ended: the
/// round trips that had to be waited for in sequence. A request without an end counts as lasting for ever.
#[must_use]
pub fn in_sequence(records: &[Record]) -> usize {
    let mut spans: Vec<_> = records
        .iter()
        .map(|record| (record.ended.unwrap_or(Duration::MAX), record.started))
        .collect();
    spans.sort_unstable();
    // Taking the one that ends first, again and again, gives the longest row of intervals that do not overlap.
    let mut free_at = None;
    let mut count = 0;
    for (ended, started) in spans {
        if free_at.is_none_or(|free_at| started >= free_at) {
            free_at = Some(ended);
            count += 1;
        }
    }
    count
}

/// Requests and bytes of `records` by path.
#[must_use]
pub fn traffic_by_path(records: &[Record]) -> BTreeMap<String, Traffic> {
    let mut paths: BTreeMap<String, Traffic> = BTreeMap::new();
    for record in records {
        let traffic = paths.entry(record.path.clone()).or_default();
        traffic.requests += 1;
        traffic.body_bytes += record.body_bytes;
    }
    paths
}

/// The ledger itself.
#[derive(Debug)]
pub(super) struct Ledger {
    origin: Instant,
    next_sequence: u64,
    records: VecDeque<Record>,
}

/// What is known of a request when it arrives.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) endpoint: Endpoint,
    pub(super) method: String,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) range: Option<String>,
    pub(super) had_authorization: bool,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            next_sequence: 0,
            records: VecDeque::new(),
        }
    }
}

impl Ledger {
    /// Enters a request and gives its sequence number.
    pub(super) fn begin(&mut self, arrival: Arrival) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        if self.records.len() == RECORDS_MAX {
            self.records.pop_front();
        }
        self.records.push_back(Record {
            sequence,
            started: self.origin.elapsed(),
            ended: None,
            endpoint: arrival.endpoint,
            method: arrival.method,
            path: arrival.path,
            query: redact(&arrival.query),
            range: arrival.range,
            status: 0,
            body_bytes: 0,
            had_authorization: arrival.had_authorization,
        });
        sequence
    }

    /// Changes the record of `sequence`, if it is still remembered.
    fn change(&mut self, sequence: u64, change: impl FnOnce(&mut Record)) {
        let first = self.records.front().map_or(0, |record| record.sequence);
        let index = sequence.checked_sub(first).and_then(|i| usize::try_from(i).ok());
        if let Some(record) = index.and_then(|index| self.records.get_mut(index)) {
            change(record);
        }
    }

    pub(super) fn answered(&mut self, sequence: u64, status: u16) {
        self.change(sequence, |record| record.status = status);
    }

    pub(super) fn sent(&mut self, sequence: u64, bytes: u64) {
        self.change(sequence, |record| record.body_bytes += bytes);
    }

    pub(super) fn ended(&mut self, sequence: u64) {
        let now = self.origin.elapsed();
        self.change(sequence, |record| record.ended = record.ended.or(Some(now)));
    }

    pub(super) fn records(&self) -> Vec<Record> {
        self.records.iter().cloned().collect()
    }

    pub(super) fn clear(&mut self) {
        self.records.clear();
    }
}

/// `query` with the values of signatures, tokens and the like replaced.
fn redact(query: &str) -> String {
    let secret = |key: &str| {
        let key = key.to_ascii_lowercase();
        ["signature", "token", "credential", "_state"]
            .iter()
            .any(|part| key.contains(part))
    };
    let parts = query.split('&').map(|part| match part.split_once('=') {
        Some((key, _)) if secret(key) => format!("{key}=REDACTED"),
        _ => part.to_owned(),
    });
    parts.collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(started: u64, ended: Option<u64>) -> Record {
        let mut ledger = Ledger::default();
        ledger.begin(arrival("/"));
        let mut record = ledger.records().remove(0);
        record.started = Duration::from_millis(started);
        record.ended = ended.map(Duration::from_millis);
        record
    }

    fn arrival(path: &str) -> Arrival {
        Arrival {
            endpoint: Endpoint::Registry,
            method: "GET".to_owned(),
            path: path.to_owned(),
            query: "n=1&X-Amz-Signature=abc".to_owned(),
            range: None,
            had_authorization: false,
        }
    }

    #[test]
    fn parallel_requests_count_once_in_a_sequence() {
        let chain = [span(0, Some(10)), span(10, Some(20)), span(21, None)];
        assert_eq!(in_sequence(&chain), 3);
        let fan = [
            span(0, Some(10)),
            span(11, Some(30)),
            span(12, Some(20)),
            span(13, Some(40)),
            span(41, Some(50)),
        ];
        assert_eq!(in_sequence(&fan), 3);
        assert_eq!(in_sequence(&[]), 0);
    }

    #[test]
    fn records_survive_a_clear_in_the_middle_of_a_request() {
        let mut ledger = Ledger::default();
        let old = ledger.begin(arrival("/old"));
        ledger.clear();
        let new = ledger.begin(arrival("/new"));
        ledger.sent(old, 5);
        ledger.sent(new, 7);
        ledger.answered(new, 206);
        ledger.ended(new);
        let records = ledger.records();
        assert_eq!(records.len(), 1);
        assert_eq!((records[0].sequence, records[0].status), (1, 206));
        assert!(records[0].ended.is_some());
        assert_eq!(records[0].query, "n=1&X-Amz-Signature=REDACTED");
        assert_eq!(
            traffic_by_path(&records)["/new"],
            Traffic {
                requests: 1,
                body_bytes: 7
            }
        );
    }
}
