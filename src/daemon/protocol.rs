//! What goes over the control socket: frames with a kind and a length, carrying JSON messages and pieces of data.
//!
//! A client sends one message, the request. It is answered by data frames, which together are the bytes or the JSON
//! document that was asked for, and one last message, the outcome. While the work goes on, the daemon sends an empty
//! frame every [`ALIVE_INTERVAL`], so a client tells a slow answer from a daemon that stands still; and where layers have
//! to be read as a whole for it, how far that is.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Buf;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::query::{Query, repository_of};
use super::source::MountSource;
use crate::config::{BackgroundMode, Credential, KernelMode, Layer};
use crate::error::{Error, Result};

/// The version of the messages. A daemon and a client of different versions refuse each other with a remedy.
pub(super) const VERSION: u32 = 4;
/// Largest message in bytes.
const MESSAGE_BYTES_MAX: u32 = 16 << 20;
/// Largest piece of data in bytes.
pub(super) const PIECE_BYTES_MAX: usize = 1 << 20;
/// How often a daemon at work shows that it is alive.
pub(super) const ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How often it is told how far the passes are that an answer waits for.
pub(super) const WAITING_INTERVAL: Duration = Duration::from_millis(500);
/// How long a client waits for any frame before it gives the daemon up.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(20);
/// How many bytes of a frame are read before more memory is set aside for it: a piece has its place from the beginning.
const READ_STEP_BYTES: usize = PIECE_BYTES_MAX;
/// What a socket may hold on its way, as far as the system allows, in bytes: with less, the two sides of a copy wake each
/// other up all the time.
const SOCKET_BYTES: usize = 2 << 20;

/// Lets much be on its way to the other side.
pub(super) fn widen(socket: &impl AsFd) {
    // Without it everything works, slower.
    let _ = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::SndBuf, &SOCKET_BYTES);
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// A JSON message.
    Message(Vec<u8>),
    /// A piece of the answer.
    Piece(Vec<u8>),
    /// The daemon is at work.
    Alive,
    /// What the work waits for: the passes over layers, as JSON.
    Waiting(Vec<u8>),
}

const KIND_MESSAGE: u8 = 0;
const KIND_PIECE: u8 = 1;
const KIND_ALIVE: u8 = 2;
const KIND_WAITING: u8 = 3;

fn broken(why: impl Into<String>) -> Error {
    Error::malformed("control socket", why)
}

impl Frame {
    /// Writes the frame.
    pub(super) async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        let (kind, bytes, bytes_max): (u8, &[u8], u32) = match self {
            Self::Message(bytes) => (KIND_MESSAGE, bytes, MESSAGE_BYTES_MAX),
            Self::Piece(bytes) => (KIND_PIECE, bytes, MESSAGE_BYTES_MAX),
            Self::Alive => (KIND_ALIVE, &[], 0),
            Self::Waiting(bytes) => (KIND_WAITING, bytes, MESSAGE_BYTES_MAX),
        };
        let length = u32::try_from(bytes.len())
            .ok()
            .filter(|&length| length <= bytes_max)
            .ok_or_else(|| broken(format!("a message of {} bytes is too large", bytes.len())))?;
        let io = |error: std::io::Error| Error::io("control socket", &error);
        let mut header = [kind, 0, 0, 0, 0];
        header[1..].copy_from_slice(&length.to_be_bytes());
        // Both at once: the header alone would wake the other side up for nothing.
        let mut frame = Buf::chain(header.as_slice(), bytes);
        to.write_all_buf(&mut frame).await.map_err(io)?;
        to.flush().await.map_err(io)
    }

    /// Reads a frame; `None` where the stream ends before one. Memory grows only with the bytes that really come.
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<Self>> {
        let io = |error: std::io::Error| Error::io("control socket", &error);
        let mut kind = [0];
        if from.read(&mut kind).await.map_err(io)? == 0 {
            return Ok(None);
        }
        let length = from.read_u32().await.map_err(io)?;
        let bytes_max = match kind[0] {
            KIND_MESSAGE | KIND_PIECE | KIND_WAITING => MESSAGE_BYTES_MAX,
            KIND_ALIVE => 0,
            other => return Err(broken(format!("unknown kind of frame {other}"))),
        };
        if length > bytes_max {
            return Err(broken(format!("a frame of {length} bytes is too large")));
        }
        let mut bytes = Vec::with_capacity(READ_STEP_BYTES.min(length as usize));
        let mut body = from.take(u64::from(length));
        body.read_to_end(&mut bytes).await.map_err(io)?;
        if bytes.len() < length as usize {
            return Err(io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(Some(match kind[0] {
            KIND_MESSAGE => Self::Message(bytes),
            KIND_PIECE => Self::Piece(bytes),
            KIND_WAITING => Self::Waiting(bytes),
            _ => Self::Alive,
        }))
    }

    /// A message in its envelope.
    pub(super) fn message(body: &impl Serialize) -> Result<Self> {
        let envelope = Envelope {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            body,
        };
        serde_json::to_vec(&envelope)
            .map(Self::Message)
            .map_err(|error| broken(error.to_string()))
    }

    /// The body of a message, or why it is none of ours.
    pub(super) fn body<T: DeserializeOwned>(&self) -> Result<T> {
        let Self::Message(bytes) = self else {
            return Err(broken("a message was due"));
        };
        // The body is read only once the version is known to be ours: another version's may have any shape.
        let envelope: Envelope<serde_json::Value> =
            serde_json::from_slice(bytes).map_err(|error| broken(error.to_string()))?;
        if envelope.version != VERSION {
            return Err(Error::unsupported(
                "control socket",
                format!(
                    "the other side is registryfs {} and speaks version {} instead of {VERSION}; unmount with that program first",
                    envelope.program, envelope.version
                ),
            ));
        }
        serde_json::from_value(envelope.body).map_err(|error| broken(error.to_string()))
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    program: String,
    body: T,
}

/// What a client asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// A question about images, or about the daemon's state.
    Query {
        /// The question.
        query: Query,
        /// What the client's invocation said.
        given: Given,
    },
    /// Mounts, and answers when the tree does.
    Mount {
        /// What and where.
        mount: MountRequest,
        /// What the client's invocation said.
        given: Given,
        /// The client's mount namespace, as `/proc/self/ns/mnt` names it.
        namespace: String,
    },
    /// Unmounts; the connection is closed behind the answer, or when the process ends if that was its last mount.
    Unmount {
        /// Where, as the mount table spells it.
        mountpoint: PathBuf,
    },
    /// Answers when nothing is mounted there any more.
    WaitForEnd {
        /// Where, as the mount table spells it.
        mountpoint: PathBuf,
    },
}

impl Request {
    /// The repository whose layers it may have to wait for, as passes name it.
    pub(super) fn repository(&self) -> Option<String> {
        match self {
            Self::Query { query, .. } => query.repository(),
            Self::Mount { mount, .. } => match &mount.source {
                MountSource::Image(reference) => repository_of(reference),
                _ => None,
            },
            Self::Unmount { .. } | Self::WaitForEnd { .. } => None,
        }
    }

    /// Whether it lasts as long as the client, or a mount, likes.
    pub(super) fn is_lasting(&self) -> bool {
        match self {
            Self::Query { query, .. } => query.is_stream(),
            Self::WaitForEnd { .. } => true,
            Self::Mount { .. } | Self::Unmount { .. } => false,
        }
    }
}

/// The settings that an invocation named itself, with the secret that [`Layer`] does not carry along.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Given {
    layer: Layer,
    credential: Option<Credential>,
}

impl Given {
    /// Takes the secret out of the layer, which would lose it.
    pub(super) fn new(layer: &Layer) -> Self {
        Self {
            layer: layer.clone(),
            credential: layer.credential.clone(),
        }
    }

    /// The layer as the client had it.
    pub(super) fn into_layer(self) -> Layer {
        Layer {
            credential: self.credential,
            ..self.layer
        }
    }
}

/// One mount to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRequest {
    /// Where: as [`crate::fuse::resolve_new_mountpoint`] spells it, in a process that serves no mount.
    pub mountpoint: PathBuf,
    /// What.
    pub source: MountSource,
    /// `OS/ARCH[/VARIANT]` to choose from indexes; nothing means the host's.
    pub platform: Option<String>,
    /// Whether other users reach the mount.
    pub allow_other: bool,
    /// What the mount table shows as the source, as the user wrote it.
    pub shown_source: Option<String>,
    /// Whether no program of it can be run.
    pub no_exec: bool,
    /// Another way to the mountpoint, where autofs guards it: [`crate::fuse::Guarded`].
    pub place: Option<PathBuf>,
    /// Patterns of the hosts that can be looked up; empty means all.
    pub allow: Vec<String>,
    /// Patterns of the hosts that cannot.
    pub deny: Vec<String>,
    /// Whether other users see what came with credentials.
    pub share_private: bool,
    /// Whether the kernel serves root filesystems by itself.
    pub kernel: KernelMode,
    /// Whether the rest of an image is brought once its root filesystem was touched.
    pub background: BackgroundMode,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// It is done, and the pieces before this are the answer.
    Done,
    /// It failed.
    Failed(Error),
    /// The daemon is about to end, or has ended, and takes nothing on: ask again, it will be gone.
    Ending,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
        prop_oneof![
            bytes().prop_map(Frame::Message),
            bytes().prop_map(Frame::Piece),
            bytes().prop_map(Frame::Waiting),
            Just(Frame::Alive)
        ]
    }

    proptest! {
        #[test]
        fn frames_arrive_as_they_were_sent(sent in proptest::collection::vec(frames(), 0..8)) {
            run(async {
                let mut wire = Vec::new();
                for frame in &sent {
                    frame.write(&mut wire).await.unwrap();
                }
                let mut rest = wire.as_slice();
                for frame in &sent {
                    assert_eq!(Frame::read(&mut rest).await.unwrap().as_ref(), Some(frame));
                }
                assert_eq!(Frame::read(&mut rest).await.unwrap(), None);
            });
        }

        #[test]
        fn garbage_ends_in_an_error_or_a_frame(
            kind in 0..5u8,
            garbage in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            run(async {
                let wire: Vec<u8> = std::iter::once(kind).chain(garbage).collect();
                let mut rest = wire.as_slice();
                // Each round takes at least one byte off, so this ends.
                while let Ok(Some(frame)) = Frame::read(&mut rest).await {
                    assert!(frame.body::<Request>().is_err());
                }
            });
        }

        #[test]
        fn a_frame_cut_short_is_no_frame(bytes in proptest::collection::vec(any::<u8>(), 1..50), cut in 1..50usize) {
            run(async {
                let mut wire = Vec::new();
                Frame::Piece(bytes).write(&mut wire).await.unwrap();
                let kept = wire.len().saturating_sub(cut).max(1);
                assert!(Frame::read(&mut &wire[..kept]).await.is_err());
            });
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_read() {
        let wire = [KIND_MESSAGE, 0xff, 0xff, 0xff, 0xff];
        let error = run(Frame::read(&mut wire.as_slice())).unwrap_err();
        assert!(error.to_string().contains("too large"), "{error}");
    }

    #[test]
    fn another_version_is_refused_with_its_name_before_its_body_is_read() {
        let text = br#"{"version":9,"program":"4.5.6","body":{"unknown":true}}"#;
        let error = Frame::Message(text.to_vec()).body::<Request>().unwrap_err();
        assert!(error.to_string().contains("4.5.6"), "{error}");
    }

    #[test]
    fn errors_keep_their_exit_codes_and_settings_their_secret_on_the_way() {
        let error = Error::mismatch("layer", "sha256:1", "sha256:2");
        let frame = Frame::message(&Outcome::Failed(error.clone())).unwrap();
        assert_eq!(frame.body::<Outcome>().unwrap(), Outcome::Failed(error));
        let layer = Layer {
            credential: Some("u:p".parse().unwrap()),
            retries: Some(3),
            ..Layer::default()
        };
        let frame = Frame::message(&Given::new(&layer)).unwrap();
        assert_eq!(frame.body::<Given>().unwrap().into_layer(), layer);
    }
}
