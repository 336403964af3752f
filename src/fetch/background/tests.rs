//! Order and batches, on layers that nobody has to fetch.

use proptest::prelude::*;

use super::queue::FILLS_MAX;
use super::*;
use crate::fetch::flight::Waiter;
use crate::fetch::job::Urgency;
use crate::fetch::{FetchOptions, Source};
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};
use crate::layer::{Descriptor, Format};
use crate::registry::reference::Repository;
use crate::registry::{Client, ClientOptions};
use crate::store::Store;

/// A layer whose members stand behind gaps of so many bytes and are so long.
fn stretch(store: &Arc<Store>, members: &[(u64, u64)]) -> Stretch {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let size = members.iter().map(|(_, bytes)| bytes).sum();
    let file = Entry {
        size,
        ..Entry::new("file", Kind::File)
    };
    builder.entry(&file).unwrap();
    let mut at = 0;
    for &(gap, bytes) in members {
        let (blob_start, blob_end) = (at + gap, at + gap + bytes);
        let digest = Digest::of(&vec![1; bytes as usize]);
        let member = NewMember {
            blob_start,
            blob_end,
            coding: Coding::Stored,
            bits: 0,
            window: Vec::new(),
            check: Some(digest),
        };
        builder.member(member).unwrap();
        let chunk = NewChunk {
            bytes,
            blob_offset: blob_start,
            inner_offset: 0,
            digest: Some(digest),
        };
        builder.chunk(chunk).unwrap();
        at = blob_end;
    }
    let index = builder.finish(Summary::of(Format::Tar, at), at).unwrap();
    let key = Digest::of(format!("{members:?}").as_bytes());
    let layer = store.add_layer(&key, &index).unwrap();
    let descriptor = Descriptor {
        media_type: String::new(),
        digest: key,
        size: at,
        annotations: Default::default(),
        urls: Vec::new(),
    };
    let source = Source {
        repository: Repository::new("h.io", "name").unwrap(),
        descriptor,
        ztoc: None,
        place: None,
    };
    Stretch {
        source: Arc::new(source),
        members: 0..layer.index().member_count(),
        layer,
    }
}

fn keep(stretch: &Stretch, chunk: u32) {
    let record = stretch.layer.index().chunk(chunk).unwrap();
    let bytes = vec![1; record.bytes as usize];
    stretch
        .layer
        .keep(chunk..chunk + 1, record.data_offset, &bytes)
        .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Batch by batch everything that is missing comes once, in order, by requests that are neither too long nor of parts
    /// that lie far from each other.
    #[test]
    fn batches_are_what_is_missing(
        members in prop::collection::vec((0_u64..100_000, 1_u64..50_000, any::<bool>()), 1..30),
        bytes_max in 1_u64..200_000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let places: Vec<_> = members.iter().map(|&(gap, bytes, _)| (gap, bytes)).collect();
        let mut stretch = stretch(&store, &places);
        let mut missing = Vec::new();
        for (number, &(.., is_here)) in (0..).zip(&members) {
            match is_here {
                true => keep(&stretch, number),
                false => missing.push(number),
            }
        }
        let range = |number: u32| stretch.layer.index().member(number).unwrap().blob_range();
        let ranges: Vec<_> = (0..members.len() as u32).map(range).collect();
        let mut taken = Vec::new();
        while !stretch.members.is_empty() {
            let batch = batch::take(&mut stretch, bytes_max).unwrap();
            let of: Vec<_> = batch.members.iter().map(|&number| ranges[number as usize].clone()).collect();
            prop_assert_eq!(batch.bytes, of.iter().map(|range| range.end - range.start).sum::<u64>());
            prop_assert_eq!(batch.decoded_bytes, batch.bytes);
            if of.len() > 1 {
                prop_assert!(of[of.len() - 1].end - of[0].start <= bytes_max);
            }
            for pair in of.windows(2) {
                prop_assert!(pair[1].start - pair[0].end <= plan::GAP_BYTES_MAX);
            }
            prop_assert!(!of.is_empty() || stretch.members.is_empty());
            taken.extend(batch.members);
        }
        prop_assert_eq!(taken, missing);
    }
}

struct Fills {
    _dir: tempfile::TempDir,
    stretch: Stretch,
    queue: Queue,
    mount: Arc<()>,
}

impl Fills {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Self {
            stretch: stretch(&store, &[(0, 10)]),
            _dir: dir,
            queue: Queue::default(),
            mount: Arc::default(),
        }
    }

    /// Touches an image, and puts in what that asks for. Answers the images that had to go.
    fn touch(&mut self, image: &str, mode: BackgroundMode) -> Vec<String> {
        let (key, mount) = (Digest::of(image.as_bytes()), Arc::downgrade(&self.mount));
        let wanted = self.queue.touch(key, mode, &mount);
        let parts = [(What::Landmarks, wanted.landmarks), (What::Rest, wanted.rest)];
        let parts = parts.into_iter().filter(|(_, is_wanted)| *is_wanted);
        let fills = parts.map(|(what, _)| Fill {
            stretches: [self.stretch.clone()].into(),
            total_bytes: 10,
            ..Fill::new(image, key, what, mode, mount.clone())
        });
        let fills = fills.collect();
        let dropped = self.queue.put(fills).into_iter();
        dropped.map(|fill| fill.image).collect()
    }

    fn order(&mut self) -> Vec<(String, What)> {
        let mut order = Vec::new();
        while let Some(fill) = self.queue.turn(Instant::now()) {
            fill.stretches.clear();
            order.push((fill.image.clone(), fill.what));
        }
        order
    }
}

fn order(expected: &[(&str, What)]) -> Vec<(String, What)> {
    let expected = expected.iter();
    expected.map(|&(image, what)| (image.to_owned(), what)).collect()
}

#[test]
fn what_is_read_first_comes_first_and_then_the_image_touched_last() {
    let mut fills = Fills::new();
    fills.touch("a", BackgroundMode::Full);
    fills.touch("b", BackgroundMode::Idle);
    fills.touch("c", BackgroundMode::Off);
    fills.touch("a", BackgroundMode::Full);
    let expected = [
        ("a", What::Landmarks),
        ("c", What::Landmarks),
        ("b", What::Landmarks),
        ("a", What::Rest),
        ("b", What::Rest),
    ];
    assert_eq!(fills.order(), order(&expected));
    assert_eq!(fills.queue.take_done().len(), 5);
}

#[test]
fn an_image_is_filled_once_and_its_rest_when_that_is_first_wanted() {
    let mut fills = Fills::new();
    fills.touch("a", BackgroundMode::Off);
    assert_eq!(fills.order(), order(&[("a", What::Landmarks)]));
    fills.queue.take_done();
    fills.touch("a", BackgroundMode::Off);
    assert_eq!(fills.order(), []);
    fills.touch("a", BackgroundMode::Idle);
    fills.touch("a", BackgroundMode::Full);
    let fill = fills.queue.turn(Instant::now()).unwrap();
    assert_eq!((fill.what, fill.mode), (What::Rest, BackgroundMode::Full));
    assert_eq!(fills.order(), order(&[("a", What::Rest)]));
    fills.queue.take_done();
    fills.touch("a", BackgroundMode::Full);
    assert_eq!(fills.order(), []);
}

#[test]
fn the_image_touched_least_recently_goes_when_there_are_too_many() {
    let mut fills = Fills::new();
    // Their landmarks are known to be there.
    for number in 0..=FILLS_MAX {
        fills.touch(&number.to_string(), BackgroundMode::Off);
        fills.order();
        fills.queue.take_done();
    }
    for number in 0..FILLS_MAX {
        let dropped = fills.touch(&number.to_string(), BackgroundMode::Full);
        assert_eq!(dropped, [""; 0]);
    }
    fills.touch("0", BackgroundMode::Full);
    assert_eq!(fills.touch(&FILLS_MAX.to_string(), BackgroundMode::Full), ["1"]);
    // It may be asked for again.
    assert_eq!(fills.touch("1", BackgroundMode::Full), ["2"]);
}

#[test]
fn a_registry_that_is_away_is_asked_again_after_pauses_that_get_longer() {
    let mut fills = Fills::new();
    fills.touch("a", BackgroundMode::Full);
    fills.touch("b", BackgroundMode::Off);
    let (mut now, mut pauses) = (Instant::now(), Vec::new());
    for _ in 0..10 {
        let fill = fills.queue.find(&Digest::of(b"a"), What::Rest).unwrap();
        fill.back_off(now);
        let pause = fill.paused_until.unwrap() - now;
        fills.queue.drop_all(|fill| fill.what == What::Landmarks);
        assert!(fills.queue.turn(now).is_none());
        now += pause;
        assert!(fills.queue.turn(now).is_some());
        pauses.push(pause);
    }
    assert!(pauses.windows(2).all(|pair| pair[0] <= pair[1]), "{pauses:?}");
    assert!(pauses[0] < pauses[9] && pauses[8] == pauses[9], "{pauses:?}");
    let fill = fills.queue.find(&Digest::of(b"a"), What::Rest).unwrap();
    fill.progressed(10);
    fill.back_off(now);
    assert_eq!(fill.paused_until, Some(now + pauses[0]));
}

#[test]
fn a_fill_ends_with_the_last_mount_that_wants_it() {
    let mut fills = Fills::new();
    fills.touch("a", BackgroundMode::Full);
    let second: Arc<()> = Arc::default();
    let key = Digest::of(b"a");
    fills
        .queue
        .touch(key, BackgroundMode::Idle, &Arc::downgrade(&second));
    fills.mount = Arc::default();
    assert!(fills.queue.take_unwanted().is_empty());
    drop(second);
    assert_eq!(fills.queue.take_unwanted().len(), 2);
    // Another mount may ask for it again.
    fills.touch("a", BackgroundMode::Full);
    assert_eq!(fills.order(), order(&[("a", What::Landmarks), ("a", What::Rest)]));
}

#[test]
fn copies_that_nobody_waits_for_stand_back_for_readers() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (from, to) = (
        stretch(&store, &[(0, 100), (0, 200)]),
        stretch(&store, &[(1, 100), (0, 200)]),
    );
    (0..2).for_each(|chunk| keep(&from, chunk));
    store.digests().offer(&from.layer, from.source.audience());
    store.digests().settle();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = Client::new(ClientOptions::default()).unwrap();
    let fetcher = Fetcher::new(client, store, runtime.handle().clone(), FetchOptions::default());
    let launch = |urgency, members: &[u32]| {
        let launched = fetcher.launch_as(urgency, &to.source, &to.layer, members, None);
        launched.unwrap()
    };
    let come = |waiters: Vec<Waiter>| {
        let arrivals = waiters.into_iter().map(|waiter| waiter.arrival);
        arrivals.for_each(|arrival| runtime.block_on(arrival).unwrap());
    };
    let reader = fetcher.foreground.enter();
    let ahead = launch(Urgency::Ahead, &[0]);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!to.layer.is_present(0), "a reader waits for something else");
    // What he waits for is copied all the same, and so is what is ahead once he needs that.
    come(launch(Urgency::Awaited, &[1]));
    assert!(!to.layer.is_present(0));
    come(launch(Urgency::Awaited, &[0]));
    come(ahead);
    let later = launch(Urgency::Ahead, &[0, 1]);
    assert!(later.is_empty(), "they are there");
    to.layer.evict(std::slice::from_ref(&(0..2))).unwrap();
    let ahead = launch(Urgency::Ahead, &[0, 1]);
    drop(reader);
    come(ahead);
    assert!((0..2).all(|chunk| to.layer.is_present(chunk)));
}
