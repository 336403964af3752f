//! A slow line to the lab's servers for one mount (`scripts/lib/slow_line.py`): requests that wait for each other are
//! apart, and nobody else's are among them, so a test can say how many there were and how many in sequence.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Deserialize;

use super::world::{lab, script};

/// What servers are called here, and their settings in the lab's environment.
const SERVERS: [(&str, &str); 11] = [
    ("plain", "LAB_PLAIN"),
    ("token", "LAB_TOKEN"),
    ("token-short", "LAB_TOKEN_SHORT"),
    ("redirect", "LAB_REDIRECT"),
    ("token-redirect", "LAB_TOKEN_REDIRECT"),
    ("mirror", "LAB_MIRROR"),
    ("signed", "LAB_SIGNED"),
    ("signed-opaque", "LAB_SIGNED_OPAQUE"),
    ("auth", "LAB_AUTH"),
    ("blobs", "LAB_BLOBS"),
    ("signed-blobs", "LAB_SIGNED_BLOBS"),
];
/// Long against what a loaded machine needs between two requests that do not wait for each other.
const ROUND_TRIP_MS: u32 = 150;

/// A request as the line saw it.
#[derive(Debug, Deserialize)]
// Some fields are only there to be printed when a test fails.
#[allow(dead_code)]
pub(super) struct Request {
    port: u16,
    begins: f64,
    ends: Option<f64>,
    method: String,
    pub(super) uri: String,
    status: u16,
    pub(super) range: String,
    /// The scheme of its `Authorization`, empty without one.
    pub(super) authorization: String,
}

impl Request {
    /// Its server and the kind of its answer, as in `token 307`.
    pub(super) fn brief(&self) -> String {
        let here = |variable: &str| lab(variable).ends_with(&format!(":{}", self.port));
        let server = SERVERS.iter().find(|(_, variable)| here(variable));
        format!("{} {}", server.map_or("?", |(name, _)| name), self.status)
    }
}

/// The line; it ends when it is dropped.
pub(super) struct Line {
    process: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    namespace: String,
}

impl Line {
    pub(super) fn new() -> Self {
        let ports = SERVERS.map(|(_, variable)| lab(variable).rsplit_once(':').unwrap().1.to_owned());
        let mut process = Command::new("/usr/bin/python3")
            .arg(script("lib/slow_line.py"))
            .arg(format!("--round-trip-ms={ROUND_TRIP_MS}"))
            .args(ports)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = process.stdin.take();
        let mut answers = BufReader::new(process.stdout.take().unwrap());
        let mut namespace = String::new();
        answers.read_line(&mut namespace).unwrap();
        assert!(namespace.starts_with("/proc/"), "the line did not start");
        Self {
            process,
            commands,
            answers,
            namespace: namespace.trim().to_owned(),
        }
    }

    /// The network namespace at this end.
    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The requests since the last call, as they began, without the question whether a server speaks TLS.
    pub(super) fn take(&mut self) -> Vec<Request> {
        let requests = self.ask("requests");
        self.ask("clear");
        let requests: Vec<Request> = serde_json::from_str(&requests).unwrap();
        requests
            .into_iter()
            .filter(|request| request.method != "-")
            .collect()
    }

    /// From now on no connection to a server is made, as if it had died; those that are there end.
    pub(super) fn refuse(&mut self, variable: &str) {
        let address = lab(variable);
        let (_, port) = address.rsplit_once(':').unwrap();
        self.ask(&format!("refuse {port}"));
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.commands.as_mut().unwrap(), "{command}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = self.process.wait();
    }
}

/// What was asked, in the words of [`Request::brief`], sorted.
pub(super) fn briefs(requests: &[Request]) -> Vec<String> {
    let mut briefs: Vec<String> = requests.iter().map(Request::brief).collect();
    briefs.sort();
    briefs
}

/// How many requests had to wait for each other: the most that can be put in a row without an overlap.
pub(super) fn in_sequence(requests: &[Request]) -> usize {
    let ends = |request: &Request| request.ends.unwrap_or(f64::INFINITY);
    let mut by_end: Vec<&Request> = requests.iter().collect();
    by_end.sort_by(|a, b| ends(a).total_cmp(&ends(b)));
    let mut free_at = f64::NEG_INFINITY;
    let mut count = 0;
    for request in by_end {
        if request.begins >= free_at {
            free_at = ends(request);
            count += 1;
        }
    }
    count
}
