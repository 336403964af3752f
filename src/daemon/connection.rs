//! A client's end of the control socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::protocol::{Frame, Outcome, Request, SILENCE_MAX};
use crate::error::{Error, Result};
use crate::fetch::PassProgress;
use crate::store::lock;

/// Largest JSON document of an answer in bytes, so that a broken daemon cannot fill the client's memory.
const DOCUMENT_BYTES_MAX: usize = 256 << 20;

/// A connection to a daemon, good for one request.
#[derive(Debug)]
pub(super) struct Connection {
    stream: BufReader<UnixStream>,
    /// The process at the other end, where the kernel can name it.
    daemon_pid: Option<i32>,
    has_answered: bool,
    waiting: Waiting,
}

/// Shows which layers are being read as a whole while an answer waits for them; nothing, once it does not any more.
pub(super) type ShowWaiting = fn(&[PassProgress]);

/// What is shown of the wait for an answer.
#[derive(Debug)]
pub(super) struct Waiting {
    show: ShowWaiting,
    is_shown: bool,
}

impl Waiting {
    pub(super) fn new(show: ShowWaiting) -> Self {
        Self {
            show,
            is_shown: false,
        }
    }

    /// The wait goes on, for these passes.
    pub(super) fn tell(&mut self, passes: &[PassProgress]) {
        if self.is_shown || !passes.is_empty() {
            (self.show)(passes);
            self.is_shown = !passes.is_empty();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.tell(&[]);
    }
}

/// What an answer consists of.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// A piece of the bytes.
    Piece(Vec<u8>),
    /// The end.
    Outcome(Outcome),
}

impl Connection {
    /// Connects to the daemon of the store at `cache_dir`; `None` where none listens.
    pub(super) async fn to_store(cache_dir: &Path) -> Result<Option<Self>> {
        match lock::holder(cache_dir).and_then(|holder| holder.socket) {
            Some(socket) => Self::to(&socket).await,
            None => Ok(None),
        }
    }

    /// Connects to a socket; `None` where nobody listens on it, be it that whoever did has just ended: the kernel then
    /// resets a connection that was made already.
    pub(super) async fn to(socket: &Path) -> Result<Option<Self>> {
        let failed = |error: io::Error| Error::io(socket.display().to_string(), &error);
        let stream = match timeout(SILENCE_MAX, UnixStream::connect(socket)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Ok(None);
            }
            Ok(Err(error)) => return Err(failed(error)),
            Err(_) => return Err(silent(socket.display().to_string(), SILENCE_MAX)),
        };
        let peer = stream.peer_cred().map_err(failed)?;
        if !is_trusted(peer.uid()) {
            return Err(Error::denied(
                socket.display().to_string(),
                format!("another user ({}) listens there", peer.uid()),
            ));
        }
        Ok(Some(Self {
            stream: BufReader::new(stream),
            daemon_pid: peer.pid(),
            has_answered: false,
            waiting: Waiting::new(|_| {}),
        }))
    }

    /// The same with someone who shows what is waited for.
    pub(super) fn showing(self, show: ShowWaiting) -> Self {
        let waiting = Waiting::new(show);
        Self { waiting, ..self }
    }

    /// Sends the request. A daemon that is gone already shows in [`Self::next`].
    pub(super) async fn send(&mut self, request: &Request) -> Result<()> {
        let frame = Frame::message(request)?;
        match timeout(SILENCE_MAX, frame.write(&mut self.stream)).await {
            Ok(Ok(()) | Err(Error::Io { .. })) => Ok(()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.silent(SILENCE_MAX)),
        }
    }

    /// The next part of the answer. A daemon that shows no sign of life is given up. One that hangs up before it said
    /// anything was about to end when the connection was made, and never saw the request.
    pub(super) async fn next(&mut self) -> Result<Part> {
        loop {
            let frame = match timeout(SILENCE_MAX, Frame::read(&mut self.stream)).await {
                Ok(Ok(Some(frame))) => frame,
                Ok(Ok(None) | Err(Error::Io { .. })) if !self.has_answered => {
                    return Ok(Part::Outcome(Outcome::Ending));
                }
                Ok(Ok(None) | Err(Error::Io { .. })) => {
                    return Err(Error::busy("daemon", "it ended before it had answered"));
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(self.silent(SILENCE_MAX)),
            };
            self.has_answered = true;
            match frame {
                Frame::Alive => {}
                Frame::Waiting(passes) => {
                    self.waiting
                        .tell(&serde_json::from_slice::<Vec<_>>(&passes).unwrap_or_default());
                }
                Frame::Piece(bytes) => {
                    self.waiting.tell(&[]);
                    return Ok(Part::Piece(bytes));
                }
                message @ Frame::Message(_) => {
                    self.waiting.tell(&[]);
                    return message.body().map(Part::Outcome);
                }
            }
        }
    }

    /// Sends the request and collects what answers it.
    pub(super) async fn call(&mut self, request: &Request) -> Result<(Vec<u8>, Outcome)> {
        self.send(request).await?;
        let mut document = Vec::new();
        loop {
            match self.next().await? {
                Part::Outcome(outcome) => return Ok((document, outcome)),
                Part::Piece(bytes) if document.len() + bytes.len() <= DOCUMENT_BYTES_MAX => {
                    document.extend_from_slice(&bytes);
                }
                Part::Piece(_) => return Err(Error::malformed("control socket", "an endless answer")),
            }
        }
    }

    /// Waits until the daemon closes the connection: at once, or when its process ends.
    pub(super) async fn wait_for_close(mut self, deadline: Duration) -> Result<()> {
        let mut byte = [0];
        // Nothing is due any more, so whatever ends the wait, a reset included, is the close.
        match timeout(deadline, self.stream.read(&mut byte)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.silent(deadline)),
        }
    }

    /// The error for a daemon that shows no sign of life: it is stopped, or hangs.
    fn silent(&self, waited: Duration) -> Error {
        let who = match self.daemon_pid {
            Some(pid) => format!(
                "the daemon (process {pid}; if it stays silent, end it with `kill -9 {pid}` and then take its mounts away with `umount -l`)"
            ),
            None => "the daemon".to_owned(),
        };
        silent(who, waited)
    }
}

/// Whether a process of `uid` is as good as one of ours: the same user, or root.
pub(super) fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

fn silent(what: impl Into<String>, waited: Duration) -> Error {
    Error::Timeout {
        what: what.into(),
        waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_ends_while_it_is_called_is_none_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let is_over = Arc::new(AtomicBool::new(false));
        let daemons = {
            let (socket, is_over) = (socket.clone(), Arc::clone(&is_over));
            std::thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
                    std::thread::yield_now();
                    drop(listener);
                    std::fs::remove_file(&socket).unwrap();
                }
            })
        };
        for _ in 0..20_000 {
            if let Some(mut connection) = Connection::to(&socket).await.unwrap() {
                assert_eq!(connection.next().await.unwrap(), Part::Outcome(Outcome::Ending));
            }
        }
        is_over.store(true, Ordering::Relaxed);
        daemons.join().unwrap();
    }

    #[tokio::test]
    async fn a_silent_daemon_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let connection = Connection::to(&socket).await.unwrap().unwrap();
        let error = connection.silent(SILENCE_MAX);
        let text = error.to_string();
        assert_eq!(error.exit_code(), 6);
        for part in [format!("kill -9 {}", std::process::id()), "umount -l".to_owned()] {
            assert!(text.contains(&part), "{text}");
        }
    }
}
