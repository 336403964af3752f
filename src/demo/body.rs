//! The body of an answer on its way: in pieces, at the rates that are set, cut or stalled where a fault says so, each
//! piece entered in the ledger.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

use super::ledger::Ledger;

/// Largest piece handed to the connection at once, so that the ledger counts what a client that goes away has got.
const PIECE_BYTES_MAX: u64 = 64 << 10;
/// How often a cut waits for the connection to have sent what came before it.
const FLUSH_POLL: Duration = Duration::from_millis(1);

/// Hands out the time at a number of bytes a second.
#[derive(Debug, Default)]
pub(super) struct Pacer(Mutex<Option<Instant>>);

impl Pacer {
    /// Reserves the time that `bytes` take; the moment when they may be sent.
    fn reserve(&self, bytes: u64, bytes_per_s: u64) -> Instant {
        let mut free_at = self.0.lock();
        let start = free_at.map_or_else(Instant::now, |free_at| free_at.max(Instant::now()));
        let end = start + Duration::from_secs_f64(bytes as f64 / bytes_per_s as f64);
        *free_at = Some(end);
        end
    }
}

/// A limit of a body, shared with whoever shares the limit.
#[derive(Debug, Clone)]
pub(super) struct Limit {
    pub(super) pacer: Arc<Pacer>,
    /// Never 0.
    pub(super) bytes_per_s: u64,
}

/// What the service and the socket of one connection tell each other.
#[derive(Debug, Default)]
pub(super) struct Connection {
    /// The pacer of this connection.
    pub(super) pacer: Arc<Pacer>,
    /// Set when closing shall be a reset.
    pub(super) reset: AtomicBool,
    /// Counts how often everything buffered was sent.
    pub(super) flushes: AtomicU64,
}

/// How a body is sent.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) limits: Vec<Limit>,
    pub(super) cut_after: Option<u64>,
    pub(super) stall_after: Option<u64>,
    /// How long a stall lasts; `None` is for ever.
    pub(super) stall_pause: Option<Duration>,
}

/// The entry of a request in the ledger; it ends when this is dropped at the latest.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) ledger: Arc<Mutex<Ledger>>,
    pub(super) sequence: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.ledger.lock().ended(self.sequence);
    }
}

/// See the top of this file.
pub(super) struct PlannedBody {
    rest: Bytes,
    sent: u64,
    plan: Plan,
    /// The piece that is paid for and waits for its moment, and that moment.
    waiting: Option<(u64, Pin<Box<Sleep>>)>,
    stall: Option<Pin<Box<Sleep>>>,
    flush_poll: Option<Pin<Box<Sleep>>>,
    /// The connection's count of flushes when the last piece, or the head before the first, was handed over.
    flushes: u64,
    connection: Arc<Connection>,
    entry: Entry,
}

impl fmt::Debug for PlannedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlannedBody")
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}

impl PlannedBody {
    /// A body of `bytes`; none at all if there are none and no cut.
    pub(super) fn new(bytes: Bytes, plan: Plan, connection: Arc<Connection>, entry: Entry) -> Self {
        let flushes = connection.flushes.load(Ordering::Acquire);
        let body = Self {
            rest: bytes,
            sent: 0,
            plan,
            waiting: None,
            stall: None,
            flush_poll: None,
            flushes,
            connection,
            entry,
        };
        if body.is_end_stream() {
            body.entry.ledger.lock().ended(body.entry.sequence);
        }
        body
    }

    /// Bytes that may be sent before the next planned event.
    fn piece_bytes(&self) -> u64 {
        let events = [self.plan.cut_after, self.plan.stall_after];
        let until_event = events
            .into_iter()
            .flatten()
            .map(|at| at.saturating_sub(self.sent));
        // A tenth of a second at the lowest rate, so that slow bodies flow and do not jerk.
        let rate = self.plan.limits.iter().map(|limit| limit.bytes_per_s / 10).min();
        until_event
            .chain(rate.map(|bytes| bytes.max(1)))
            .fold(PIECE_BYTES_MAX.min(self.rest.len() as u64), u64::min)
    }

    /// Ready once the connection has sent what it was given, so that a cut comes after the bytes and not instead of them.
    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.connection.flushes.load(Ordering::Acquire) == self.flushes {
            let sleep = self
                .flush_poll
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(FLUSH_POLL)));
            ready!(sleep.as_mut().poll(cx));
            self.flush_poll = None;
        }
        Poll::Ready(())
    }

    /// Ready once a planned stall is over.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.plan.stall_after == Some(self.sent) {
            let Some(pause) = self.plan.stall_pause else {
                return Poll::Pending;
            };
            let sleep = self
                .stall
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
            ready!(sleep.as_mut().poll(cx));
            self.plan.stall_after = None;
        }
        Poll::Ready(())
    }
}

impl Body for PlannedBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        ready!(this.poll_stall(cx));
        if this.plan.cut_after == Some(this.sent) {
            ready!(this.poll_flushed(cx));
            return Poll::Ready(Some(Err(io::ErrorKind::ConnectionAborted.into())));
        }
        if this.rest.is_empty() {
            return Poll::Ready(None);
        }
        let bytes = match &mut this.waiting {
            Some((bytes, moment)) => {
                ready!(moment.as_mut().poll(cx));
                *bytes
            }
            None => {
                let bytes = this.piece_bytes();
                let reserve = |limit: &Limit| limit.pacer.reserve(bytes, limit.bytes_per_s);
                if let Some(moment) = this.plan.limits.iter().map(reserve).max() {
                    let mut sleep = Box::pin(tokio::time::sleep_until(moment));
                    let state = sleep.as_mut().poll(cx);
                    this.waiting = Some((bytes, sleep));
                    ready!(state);
                }
                bytes
            }
        };
        this.waiting = None;
        let piece = this
            .rest
            .split_to(usize::try_from(bytes).unwrap_or(usize::MAX).min(this.rest.len()));
        this.sent += bytes;
        this.flushes = this.connection.flushes.load(Ordering::Acquire);
        let mut ledger = this.entry.ledger.lock();
        ledger.sent(this.entry.sequence, bytes);
        if this.rest.is_empty() {
            // Before the client can see the last byte, so that its next request begins after this end.
            ledger.ended(this.entry.sequence);
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.plan.cut_after.is_none()
    }

    /// Unknown on purpose: the `Content-Length` header says what the client shall believe.
    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
