//! A mutation fuzzer for every parser of bytes from outside. It needs no tools beside cargo.
//!
//! In CI it runs for a few seconds with a fixed seed; `scripts/fuzz` runs it for as long as is wanted. Environment:
//! `FUZZ_SECONDS` (in total), `FUZZ_SEED`, `FUZZ_TARGET` (part of a target's name), `FUZZ_REPLAY` (a file that a run left).
//!
//! Looked for are panics, aborts, executions that take too long, memory out of proportion to the input, and results that
//! break a rule which each target knows: an index that was accepted keeps its bounds, no chunk is handed over that is not
//! what its digest says, pieces of other sizes give the same result.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_debug_implementations
)]

mod counting;
mod engine;
mod layers;
mod mutate;
mod samples;
mod targets;
mod watch;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::{Fuzzer, note_panics, say};

const SECONDS: u64 = 10;
const SEED: u64 = 1;
/// Targets take turns of this length at most, so that a run that is ended early has seen all.
const TURN_MAX: Duration = Duration::from_secs(20);

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn number(name: &str, default: u64) -> u64 {
    let parse = |text: String| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number"))
    };
    variable(name).map_or(default, parse)
}

/// Where inputs are left: `fuzz` in cargo's target directory.
fn directory() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
    let dir = target.unwrap().join("fuzz");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn table(fuzzers: &[Fuzzer]) {
    say(&format!(
        "{:<24}{:>12}{:>10}{:>9}{:>10}",
        "target", "executions", "per s", "novel", "findings"
    ));
    for fuzzer in fuzzers {
        let per_second = fuzzer.executions as f64 / fuzzer.time.as_secs_f64().max(0.001);
        let findings = u32::from(fuzzer.finding.is_some());
        say(&format!(
            "{:<24}{:>12}{per_second:>10.0}{:>9}{findings:>10}",
            fuzzer.name(),
            fuzzer.executions,
            fuzzer.novel
        ));
    }
    let executions: u64 = fuzzers.iter().map(|fuzzer| fuzzer.executions).sum();
    say(&format!("{:<24}{executions:>12}", "all"));
}

fn replay(file: &Path) {
    let name = file
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let name = name.split('.').next().unwrap_or_default();
    let target = targets::all().into_iter().find(|target| target.name == name);
    let target = target.unwrap_or_else(|| panic!("{}: no target has this name", file.display()));
    let fuzzer = Fuzzer::new(target, 0, &directory());
    fuzzer.replay(&std::fs::read(file).unwrap());
    fuzzer.end();
}

#[test]
fn parsers_of_outside_bytes_keep_their_promises() {
    if let Some(file) = variable("FUZZ_REPLAY") {
        return replay(Path::new(&file));
    }
    let (seed, seconds) = (number("FUZZ_SEED", SEED), number("FUZZ_SECONDS", SECONDS));
    let wanted = variable("FUZZ_TARGET").unwrap_or_default();
    say(&format!("FUZZ_SEED={seed} FUZZ_SECONDS={seconds}"));
    let (begin, time, dir) = (Instant::now(), Duration::from_secs(seconds), directory());
    let chosen = targets::all()
        .into_iter()
        .filter(|target| target.name.contains(&wanted));
    let mut fuzzers: Vec<Fuzzer> = chosen.map(|target| Fuzzer::new(target, seed, &dir)).collect();
    assert!(
        !fuzzers.is_empty(),
        "FUZZ_TARGET={wanted} is part of no target's name"
    );
    note_panics();
    while begin.elapsed() < time && fuzzers.iter().any(|fuzzer| fuzzer.finding.is_none()) {
        let left = time.saturating_sub(begin.elapsed());
        let turn = (left / fuzzers.len() as u32).clamp(Duration::from_millis(50), TURN_MAX);
        for fuzzer in fuzzers.iter_mut().filter(|fuzzer| fuzzer.finding.is_none()) {
            fuzzer.run(turn);
        }
        if turn == TURN_MAX {
            table(&fuzzers);
        }
    }
    table(&fuzzers);
    fuzzers.iter().for_each(Fuzzer::end);
    let found: Vec<&str> = fuzzers
        .iter()
        .filter_map(|fuzzer| fuzzer.finding.as_deref())
        .collect();
    let _ = std::panic::take_hook();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}
