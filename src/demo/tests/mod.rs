//! The demo registry over the wire, by a client of a few lines that shows exactly what came: an HTTP library would
//! repair half of the faults.

mod api;
mod faults;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use bytes::Bytes;

use super::{Behaviour, Content, DemoRegistry};

const TIMEOUT: Duration = Duration::from_secs(20);

struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
    /// How the connection ended, if not well.
    error: Option<ErrorKind>,
}

impl Reply {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn error_code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().unwrap().to_owned()
    }
}

fn connect(host: &str) -> TcpStream {
    let stream = TcpStream::connect(host).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

fn send(host: &str, request: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    converse(connect(host), host, request, headers, body)
}

fn converse(
    mut stream: impl Read + Write,
    host: &str,
    request: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Reply {
    let headers: String = headers.iter().map(|(k, v)| format!("{k}: {v}\r\n")).collect();
    let head = format!(
        "{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut bytes = Vec::new();
    let error = stream.read_to_end(&mut bytes).err().map(|e| e.kind());
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let (head, body) = match end {
        Some(end) => (
            String::from_utf8(bytes[..end].to_vec()).unwrap(),
            bytes[end + 4..].to_vec(),
        ),
        None => (String::new(), bytes),
    };
    let status = head.split(' ').nth(1).map_or(0, |status| status.parse().unwrap());
    Reply {
        status,
        head,
        body,
        error,
    }
}

fn get(host: &str, path: &str) -> Reply {
    send(host, &format!("GET {path}"), &[], b"")
}

fn get_range(host: &str, path: &str, range: &str) -> Reply {
    send(host, &format!("GET {path}"), &[("Range", range)], b"")
}

/// A blob in which every position can be told from its neighbours, and the path of it in `a/b`.
fn with_blob(behaviour: Behaviour) -> (DemoRegistry, Bytes, String) {
    let blob: Bytes = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut content = Content::new();
    let digest = content.put_blob("a/b", blob.clone());
    let registry = DemoRegistry::start(content, behaviour).unwrap();
    (registry, blob, format!("/v2/a/b/blobs/{digest}"))
}
