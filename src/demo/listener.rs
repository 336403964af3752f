//! The demo registry's sockets. A listener can be closed, with all its connections, and opened again on the same port:
//! a bound socket that never listens keeps the port reserved meanwhile, and the kernel refuses who connects to it.
//! SO_REUSEADDR lets the listener have the same port, because the reservation does not listen; unlike with
//! SO_REUSEPORT, no second listener gets it, of whatever program.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::body::Connection;
use super::server::{Place, Shared, serve};

/// Most connections of one listener at a time; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 1024;
/// The kernel's queue of connections not yet accepted.
const BACKLOG: u32 = 1024;
/// How long a client may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Wait after a failed accept, so that running out of descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long stopping waits for the connections to be gone.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// A reserved port.
#[derive(Debug)]
pub(super) struct Port {
    address: SocketAddr,
    /// Bound and never listening. Never read: it is there to exist.
    _reservation: TcpSocket,
}

fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

impl Port {
    /// Reserves `address`; port 0 is any free one. Must be called in a runtime.
    pub(super) fn reserve(address: SocketAddr) -> io::Result<Self> {
        let reservation = bound(address)?;
        Ok(Self {
            address: reservation.local_addr()?,
            _reservation: reservation,
        })
    }

    /// The address with its real port.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts to listen. Must be called in a runtime.
    pub(super) fn listen(
        &self,
        place: Place,
        tls: Option<TlsAcceptor>,
        shared: Arc<Shared>,
    ) -> io::Result<Listening> {
        let listener = bound(self.address)?.listen(BACKLOG)?;
        let (stop, stopped) = oneshot::channel();
        let (gone_sender, gone) = mpsc::sync_channel(1);
        tokio::spawn(async move {
            accept(listener, stopped, place, tls, shared).await;
            // Whoever stopped may have given up waiting; then nobody needs to know.
            let _ = gone_sender.send(());
        });
        Ok(Listening { stop, gone })
    }
}

/// A listener at work.
#[derive(Debug)]
pub(super) struct Listening {
    stop: oneshot::Sender<()>,
    gone: mpsc::Receiver<()>,
}

impl Listening {
    /// Closes the listener and all its connections; when this returns, they are closed.
    pub(super) fn stop(self) {
        let told = self.stop.send(()).is_ok();
        if told {
            // A timeout leaves connections to die a little later, which is the best that can be done.
            let _ = self.gone.recv_timeout(STOP_TIMEOUT);
        }
    }
}

async fn accept(
    listener: TcpListener,
    mut stopped: oneshot::Receiver<()>,
    place: Place,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, place.clone(), tls.clone(), Arc::clone(&shared)));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn converse(stream: TcpStream, place: Place, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    // Without it, small answers could wait for an acknowledgement and spoil every measurement; not worth failing for.
    let _ = stream.set_nodelay(true);
    let connection = Arc::new(Connection::default());
    let socket = Socket {
        stream,
        connection: Arc::clone(&connection),
    };
    let service = service_fn(|request| {
        serve(
            Arc::clone(&shared),
            place.clone(),
            Arc::clone(&connection),
            request,
        )
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    // How a conversation ends, well or by a fault that was asked for, is in the ledger.
    let _ = match tls {
        None => http.serve_connection(TokioIo::new(socket), service).await,
        Some(tls) => match tls.accept(socket).await {
            Ok(socket) => http.serve_connection(TokioIo::new(socket), service).await,
            Err(_) => return,
        },
    };
}

/// A stream that tells when everything was sent, and that can end in a reset.
#[derive(Debug)]
struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.connection.reset.load(Ordering::Acquire) {
            // Closing with a linger time of zero makes the kernel send RST; failing leaves an ordinary close.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Whoever writes here flushes when its own buffers are empty, so this is the moment when all was sent.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.flushes.fetch_add(1, Ordering::AcqRel);
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
