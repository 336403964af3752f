//! A small proxy: CONNECT, plain HTTP, and SOCKS5. It logs where it was asked to go and goes to one backend, whatever
//! was asked, so that names which nobody could resolve can be used.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What the proxy does with whoever comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    Pass,
    /// Only with this `Proxy-Authorization`.
    Login(&'static str),
    Refuse,
}

pub(crate) struct Proxy {
    address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn start(backend: SocketAddr, rule: Rule) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let destinations = Arc::clone(&log);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let destinations = Arc::clone(&destinations);
                connections.spawn(async move { serve(stream, backend, rule, &destinations).await });
            }
        });
        Self {
            address,
            log,
            accepting,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it was asked to go: `CONNECT HOST:PORT`, `GET http://…`, `SOCKS HOST:PORT`.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    backend: SocketAddr,
    rule: Rule,
    log: &Mutex<Vec<String>>,
) -> Option<()> {
    let mut first = [0];
    stream.peek(&mut first).await.ok()?;
    if first[0] == 5 {
        return socks(stream, backend, log).await;
    }
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let line = head.lines().next()?;
    let (asked, _) = line.rsplit_once(" HTTP/")?;
    log.lock().push(asked.to_owned());
    let is_known = |login: &str| {
        let mut lines = head.lines().map(str::to_ascii_lowercase);
        lines.any(|line| line == format!("proxy-authorization: {login}").to_ascii_lowercase())
    };
    let refusal = match rule {
        Rule::Login(login) if !is_known(login) => Some("407 Proxy Authentication Required"),
        Rule::Refuse => Some("403 Forbidden"),
        _ => None,
    };
    if let Some(status) = refusal {
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.ok()?;
        return None;
    }
    let mut to = TcpStream::connect(backend).await.ok()?;
    match asked.starts_with("CONNECT ") {
        true => stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?,
        false => {
            // The backend is a server and wants a path.
            let path = asked.splitn(4, '/').nth(3)?;
            let rest = head.split_once("\r\n")?.1;
            let request = format!("GET /{path} HTTP/1.1\r\n{rest}");
            to.write_all(request.as_bytes()).await.ok()?;
        }
    }
    copy_bidirectional(&mut stream, &mut to).await.ok()?;
    Some(())
}

/// SOCKS5 without a login, by a name (RFC 1928).
async fn socks(mut stream: TcpStream, backend: SocketAddr, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut greeting = [0; 2];
    stream.read_exact(&mut greeting).await.ok()?;
    let mut methods = vec![0; usize::from(greeting[1])];
    stream.read_exact(&mut methods).await.ok()?;
    stream.write_all(&[5, 0]).await.ok()?;
    let mut request = [0; 5];
    stream.read_exact(&mut request).await.ok()?;
    assert_eq!(request[3], 3, "a name is asked for, and resolved by the proxy");
    let mut name = vec![0; usize::from(request[4])];
    stream.read_exact(&mut name).await.ok()?;
    let port = stream.read_u16().await.ok()?;
    log.lock()
        .push(format!("SOCKS {}:{port}", String::from_utf8(name).ok()?));
    stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.ok()?;
    let mut to = TcpStream::connect(backend).await.ok()?;
    copy_bidirectional(&mut stream, &mut to).await.ok()?;
    Some(())
}
