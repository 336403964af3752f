//! A scripted HTTP server on loopback: a closure answers each request, everything that came is logged, and an answer
//! may break off or stop midway as no HTTP library would let it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// The first byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
    /// The body as it came.
    pub(crate) bytes: Vec<u8>,
    /// The connection is closed before all of the body has come, and without an answer.
    pub(crate) is_cut: bool,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    /// The value of a query parameter, decoded.
    pub(crate) fn query(&self, name: &str) -> Vec<String> {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        url::form_urlencoded::parse(query.as_bytes())
            .filter(|(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
            .collect()
    }

    /// The first and last byte of the Range header.
    pub(crate) fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse().unwrap()))
    }
}

/// What happens after some bytes of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Close,
    /// Nothing more comes, and the connection stays.
    Stop,
    /// One byte every ten milliseconds.
    Drip,
}

#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The body has no length in the head.
    pub(crate) chunked: bool,
    pub(crate) broken: Option<(usize, Then)>,
}

impl Reply {
    pub(crate) fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            chunked: false,
            broken: None,
        }
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(crate) fn chunked(mut self) -> Self {
        self.chunked = true;
        self
    }

    /// Only the first `bytes` of the body come.
    pub(crate) fn broken(mut self, bytes: usize, then: Then) -> Self {
        self.broken = Some((bytes, then));
        self
    }

    /// An honest answer to a request for a blob, whole or by range.
    pub(crate) fn blob(request: &Request, blob: &[u8]) -> Self {
        match request.range() {
            None => Self::new(200).body(blob),
            Some((first, last)) => Self::new(206)
                .header("Content-Range", format!("bytes {first}-{last}/{}", blob.len()))
                .body(&blob[first..=last]),
        }
    }

    pub(crate) fn error(status: u16, code: &str) -> Self {
        Self::new(status).body(format!(
            r#"{{"errors":[{{"code":"{code}","message":"said the test"}}]}}"#
        ))
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;
/// Of a request whose body has not come: how much of it is read at most before the connection is closed.
type Cut = dyn Fn(&Request) -> Option<usize> + Send + Sync;

struct Shared {
    handler: Box<Handler>,
    cut: Box<Cut>,
    tls: Option<TlsAcceptor>,
    /// A TLS hello to a server without TLS closes the connection, instead of being answered by HTTP.
    mute: bool,
    log: Mutex<Vec<Request>>,
    /// Connections that began with a TLS handshake, and those that did not.
    hellos: AtomicUsize,
    plain: AtomicUsize,
    /// Connections that the client closed while an answer was stopped.
    abandoned: AtomicUsize,
}

pub(crate) struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(any_port(), None, handler).await
    }

    /// A server that answers a TLS hello by closing the connection.
    pub(crate) async fn start_mute(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen_as(any_port(), None, true, |_| None, handler).await
    }

    /// A server that closes the connection in the middle of some bodies.
    pub(crate) async fn start_cutting(
        cut: impl Fn(&Request) -> Option<usize> + Send + Sync + 'static,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::listen_as(any_port(), None, false, cut, handler).await
    }

    pub(crate) async fn start_tls(
        tls: TlsAcceptor,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::listen(any_port(), Some(tls), handler).await
    }

    pub(crate) async fn listen(
        address: SocketAddr,
        tls: Option<TlsAcceptor>,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::listen_as(address, tls, false, |_| None, handler).await
    }

    async fn listen_as(
        address: SocketAddr,
        tls: Option<TlsAcceptor>,
        mute: bool,
        cut: impl Fn(&Request) -> Option<usize> + Send + Sync + 'static,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            cut: Box::new(cut),
            tls,
            mute,
            log: Mutex::default(),
            hellos: AtomicUsize::new(0),
            plain: AtomicUsize::new(0),
            abandoned: AtomicUsize::new(0),
        });
        let inner = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(accepted(stream, Arc::clone(&inner)));
            }
        });
        Self {
            address,
            shared,
            accepting,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The registry's name.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.log.lock().clone()
    }

    /// Method and path of every request, in order.
    pub(crate) fn lines(&self) -> Vec<String> {
        let log = self.shared.log.lock();
        log.iter()
            .map(|request| format!("{} {}", request.method, request.path()))
            .collect()
    }

    /// How many requests went to paths that contain `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        let log = self.shared.log.lock();
        log.iter().filter(|request| request.path().contains(part)).count()
    }

    pub(crate) fn hellos(&self) -> usize {
        self.shared.hellos.load(Ordering::SeqCst)
    }

    pub(crate) fn plain_connections(&self) -> usize {
        self.shared.plain.load(Ordering::SeqCst)
    }

    pub(crate) fn connections(&self) -> usize {
        self.hellos() + self.plain_connections()
    }

    pub(crate) fn abandoned(&self) -> usize {
        self.shared.abandoned.load(Ordering::SeqCst)
    }

    /// Closes the listener and every connection.
    pub(crate) async fn stop(mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

async fn accepted(stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    if stream.peek(&mut first).await.unwrap_or(0) == 0 {
        return;
    }
    if first[0] != TLS_HANDSHAKE {
        shared.plain.fetch_add(1, Ordering::SeqCst);
        if shared.tls.is_none() {
            converse(stream, &shared).await;
        }
        return;
    }
    shared.hellos.fetch_add(1, Ordering::SeqCst);
    match &shared.tls {
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                converse(stream, &shared).await;
            }
        }
        None if shared.mute => {}
        // What Go's server, and so docker-registry, says to a TLS hello.
        None => {
            let mut stream = stream;
            let _ = stream
                .write_all(
                    b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request to an HTTP server.\n",
                )
                .await;
        }
    }
}

async fn converse(mut stream: impl AsyncRead + AsyncWrite + Unpin, shared: &Shared) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buffer, &shared.cut).await {
        shared.log.lock().push(request.clone());
        let mut reply = (shared.handler)(&request);
        if request.is_cut {
            return;
        }
        let mut head = format!("HTTP/1.1 {} Scripted\r\n", reply.status);
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if reply.chunked {
            head.push_str("Transfer-Encoding: chunked\r\n");
            let mut chunk = format!("{:x}\r\n", reply.body.len()).into_bytes();
            chunk.append(&mut reply.body);
            chunk.extend_from_slice(b"\r\n0\r\n\r\n");
            reply.body = chunk;
        } else {
            head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
        }
        head.push_str("\r\n");
        if stream.write_all(head.as_bytes()).await.is_err() {
            return;
        }
        let sent = reply.broken.map_or(reply.body.len(), |(bytes, _)| bytes);
        if request.method != "HEAD" && stream.write_all(&reply.body[..sent]).await.is_err() {
            return;
        }
        let _ = stream.flush().await;
        match reply.broken.map(|(_, then)| then) {
            None => {}
            Some(Then::Close) => return,
            Some(Then::Stop) => {
                // The client sends nothing more, so a read ends only when it goes away.
                let _ = stream.read(&mut [0]).await;
                shared.abandoned.fetch_add(1, Ordering::SeqCst);
                return;
            }
            Some(Then::Drip) => {
                for byte in &reply.body[sent..] {
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                    if stream.write_all(&[*byte]).await.is_err() || stream.flush().await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

async fn read_request(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
    cut: &Cut,
) -> Option<Request> {
    let head_end = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..head_end].to_vec()).ok()?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers
        .get("content-length")
        .map_or(0, |length| length.parse().unwrap());
    let mut request = Request {
        method,
        target,
        headers,
        body: String::new(),
        bytes: Vec::new(),
        is_cut: false,
    };
    let cut = cut(&request).filter(|cut| *cut < length);
    request.is_cut = cut.is_some();
    let length = cut.unwrap_or(length);
    while buffer.len() < head_end + 4 + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let rest = buffer.split_off(head_end + 4 + length);
    request.bytes = buffer.split_off(head_end + 4);
    request.body = String::from_utf8_lossy(&request.bytes).into_owned();
    *buffer = rest;
    Some(request)
}
