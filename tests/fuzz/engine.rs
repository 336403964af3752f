//! Runs a target on mutated inputs, keeps the inputs that made something new happen, and reduces one that breaks it.
//!
//! What happened is known by its *shape*, which the target tells: the kind of error and where in a parser it came from,
//! the magnitude of what was found. That takes the place of coverage, which would need instrumented code.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use registryfs::error::Error;

use crate::counting::growth;
use crate::mutate::{Random, mutate};
use crate::watch::Watch;

/// What a parser may allocate for an input: so much, and so many times the input.
const HEAP_BYTES: usize = 64 << 20;
const HEAP_FACTOR: usize = 64;
/// Inputs that are kept beside the seeds, and how many bytes they have together.
const KEPT_MAX: usize = 1000;
const KEPT_BYTES_MAX: usize = 16 << 20;
/// Shapes that are told apart.
const SHAPES_MAX: usize = 100_000;
/// Executions spent on reducing an input.
const REDUCTIONS_MAX: usize = 3000;

/// What happened in one execution.
#[derive(Debug, Default)]
pub(crate) struct Shape(DefaultHasher);

impl Shape {
    /// A trait that counts as it is.
    pub(crate) fn note(&mut self, what: impl Hash) {
        what.hash(&mut self.0);
    }

    /// What happened in a part of it.
    pub(crate) fn part(&mut self, part: &Self) {
        self.note(part.0.finish());
    }

    /// A number that counts by its magnitude.
    pub(crate) fn count(&mut self, number: u64) {
        self.note(u64::BITS - number.leading_zeros());
    }

    /// An error, without the names and numbers in it.
    pub(crate) fn error(&mut self, error: &Error) {
        let mut quoted = false;
        // Who quotes without quotation marks quotes at the beginning.
        let text = error.to_string();
        let why = text.rsplit_once(": ").map_or(text.as_str(), |(_, why)| why);
        self.note(std::mem::discriminant(error));
        for byte in why.bytes() {
            quoted ^= byte == b'"';
            if !quoted && !byte.is_ascii_digit() && !(b'a'..=b'f').contains(&byte) {
                self.note(byte);
            }
        }
    }

    /// An error or what `of` makes of the rest.
    pub(crate) fn result<T>(&mut self, result: Result<T, Error>, of: impl FnOnce(&mut Self, T)) {
        match result {
            Ok(made) => of(self, made),
            Err(error) => self.error(&error),
        }
    }
}

/// Parses an input; panics where a rule is broken.
type Run = Box<dyn Fn(&[u8]) -> Shape>;

/// A parser with what is needed to try it.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Valid inputs, as our own writers make them.
    pub(crate) seeds: Vec<Vec<u8>>,
    /// What the format is made of.
    pub(crate) words: &'static [&'static [u8]],
    pub(crate) run: Run,
}

/// Writes a line to standard error, also where tests' output is held back.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// From now on panics are noted, not printed.
pub(crate) fn note_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let message = match payload.downcast_ref::<String>() {
            Some(message) => message.as_str(),
            None => payload.downcast_ref::<&str>().copied().unwrap_or_default(),
        };
        PANIC.with_borrow_mut(|panic| *panic = Some(format!("{place}: {message}")));
    }));
}

/// A target at work.
pub(crate) struct Fuzzer {
    target: Target,
    corpus: Vec<Vec<u8>>,
    kept_bytes: usize,
    shapes: HashSet<u64>,
    random: Random,
    watch: Watch,
    dir: PathBuf,
    current: File,
    pub(crate) executions: u64,
    pub(crate) novel: u64,
    pub(crate) time: Duration,
    pub(crate) finding: Option<String>,
}

impl Fuzzer {
    /// `dir` is where inputs are left.
    pub(crate) fn new(target: Target, seed: u64, dir: &Path) -> Self {
        let path = current_file(dir, target.name);
        let mut hasher = DefaultHasher::new();
        (seed, target.name).hash(&mut hasher);
        Self {
            corpus: target.seeds.clone(),
            kept_bytes: 0,
            shapes: HashSet::new(),
            random: Random::new(hasher.finish()),
            watch: Watch::new(path.clone()),
            dir: dir.to_owned(),
            current: File::create(&path).unwrap(),
            executions: 0,
            novel: 0,
            time: Duration::ZERO,
            finding: None,
            target,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.target.name
    }

    /// Fuzzes for as long as that, or up to a finding.
    pub(crate) fn run(&mut self, time: Duration) {
        let begin = Instant::now();
        if self.executions == 0 {
            for seed in self.target.seeds.clone() {
                self.try_out(seed);
            }
        }
        while begin.elapsed() < time && self.finding.is_none() {
            let mut input = self.random.pick(&self.corpus).clone();
            mutate(&mut input, &self.corpus, self.target.words, &mut self.random);
            self.try_out(input);
        }
        self.time += begin.elapsed();
        self.watch.idle();
    }

    fn try_out(&mut self, input: Vec<u8>) {
        self.executions += 1;
        match self.execute(&input) {
            Ok(shape) => {
                if self.shapes.len() < SHAPES_MAX && self.shapes.insert(shape) {
                    self.novel += 1;
                    self.keep(input);
                }
            }
            Err(why) => self.found(input, &why),
        }
    }

    fn keep(&mut self, input: Vec<u8>) {
        self.kept_bytes += input.len();
        self.corpus.push(input);
        let seeds = self.target.seeds.len();
        while self.corpus.len() > seeds + KEPT_MAX || self.kept_bytes > KEPT_BYTES_MAX {
            let number = seeds + self.random.below(self.corpus.len() - seeds);
            self.kept_bytes -= self.corpus.swap_remove(number).len();
        }
    }

    /// One execution. The error says what is wrong.
    fn execute(&self, input: &[u8]) -> Result<u64, String> {
        // What ends the process finds its input here.
        let kept = self
            .current
            .set_len(0)
            .and_then(|()| self.current.write_all_at(input, 0));
        kept.unwrap();
        self.watch.next();
        let run = AssertUnwindSafe(|| (self.target.run)(input).0.finish());
        let (outcome, heap_bytes) = growth(|| catch_unwind(run));
        let shape = outcome.map_err(|_| PANIC.take().unwrap_or_default())?;
        let heap_bytes_max = HEAP_BYTES + HEAP_FACTOR * input.len();
        if heap_bytes > heap_bytes_max {
            return Err(format!("heap: it grew by more than {heap_bytes_max} bytes"));
        }
        Ok(shape)
    }

    /// Reduces the input, keeps it, and says so.
    fn found(&mut self, input: Vec<u8>, why: &str) {
        let seen = kind(why).to_owned();
        let input = self.reduce(input, &seen);
        let why = self.execute(&input).err().unwrap_or_default();
        let mut hasher = DefaultHasher::new();
        input.hash(&mut hasher);
        let file = self
            .dir
            .join(format!("{}.{:016x}", self.target.name, hasher.finish()));
        std::fs::write(&file, &input).unwrap();
        let shown = String::from_utf8_lossy(&input[..input.len().min(200)]).into_owned();
        let report = format!(
            "{}: {why}\n  {} bytes: {shown:?}\n  again: FUZZ_REPLAY={} cargo test --test fuzz",
            self.target.name,
            input.len(),
            file.display()
        );
        say(&report);
        self.finding = Some(report);
    }

    /// Leaves out pieces, from large to small, as long as the same goes wrong.
    fn reduce(&self, mut input: Vec<u8>, seen: &str) -> Vec<u8> {
        let mut piece = input.len().div_ceil(2);
        let mut left = REDUCTIONS_MAX;
        while piece > 0 && left > 0 {
            let mut at = 0;
            while at < input.len() && left > 0 {
                left -= 1;
                let mut less = input.clone();
                less.drain(at..(at + piece).min(input.len()));
                match self.execute(&less) {
                    Err(why) if kind(&why) == seen => input = less,
                    _ => at += piece,
                }
            }
            piece /= 2;
        }
        input
    }

    /// Runs one input as it is, so that a panic shows itself.
    pub(crate) fn replay(&self, input: &[u8]) {
        let (shape, heap_bytes) = growth(|| (self.target.run)(input));
        say(&format!(
            "{}: {shape:?}, the heap grew by {heap_bytes} bytes",
            self.target.name
        ));
    }

    /// Ends the work on the target.
    pub(crate) fn end(&self) {
        let _ = std::fs::remove_file(current_file(&self.dir, self.target.name));
    }
}

/// Where the input of the execution at work is, for when the process does not survive it.
fn current_file(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.{}.current", std::process::id()))
}

/// What makes two findings the same: the place, not the numbers.
fn kind(why: &str) -> &str {
    let mut colons = why.match_indices(':').map(|(at, _)| at);
    match why.starts_with("heap") {
        true => "heap",
        false => &why[..colons.nth(2).unwrap_or(why.len())],
    }
}
