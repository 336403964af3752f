//! Random numbers, and what they do to an input.

/// SplitMix64: the same numbers for the same seed, everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 if that is 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        match end {
            0 => 0,
            end => (self.next() % end as u64) as usize,
        }
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Mostly small, at most `max`.
    fn length(&mut self, max: usize) -> usize {
        let bits = self.below(17) as u32;
        (self.below(1 << bits) + 1).min(max)
    }
}

/// The largest input that mutations make.
const INPUT_BYTES_MAX: usize = 256 << 10;
/// How much of an input is near its end.
const ENDS_BYTES: usize = 4096;
const BYTES: [u8; 12] = [0, 1, 7, 0x0a, 0x20, b'/', b'"', 0x7f, 0x80, 0xfe, 0xff, b'.'];
const NUMBERS: [u64; 21] = [
    0,
    1,
    2,
    255,
    256,
    511,
    512,
    513,
    4095,
    4096,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 43,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];
const DECIMALS: [&[u8]; 14] = [
    b"0",
    b"1",
    b"-1",
    b"00",
    b"4096",
    b"65536",
    b"2147483648",
    b"4294967296",
    b"9223372036854775807",
    b"9223372036854775808",
    b"18446744073709551615",
    b"18446744073709551616",
    b"1e400",
    b"0.5",
];

/// Changes `input` in one to eight ways. `others` is where pieces of other inputs come from, `words` what the format is
/// made of.
pub(crate) fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], words: &[&[u8]], random: &mut Random) {
    for _ in 0..=random.below(8).min(random.below(8)) {
        once(input, others, words, random);
        input.truncate(INPUT_BYTES_MAX);
    }
}

fn once(input: &mut Vec<u8>, others: &[Vec<u8>], words: &[&[u8]], random: &mut Random) {
    let at = place(input.len(), random);
    match random.below(14) {
        0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
        1 if !input.is_empty() => input[at] = *random.pick(&BYTES),
        2 if !input.is_empty() => input[at] = random.next() as u8,
        3 => input.truncate(at),
        4 => {
            let end = (at + random.length(input.len())).min(input.len());
            input.drain(at..end);
        }
        5 => {
            let end = (at + random.length(input.len())).min(input.len());
            let piece = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, piece);
        }
        6 => {
            let piece = vec![*random.pick(&BYTES); random.length(4096)];
            input.splice(at..at, piece);
        }
        7 => splice(input, random.pick::<Vec<u8>>(others), at, random),
        8 => number(input, at, random),
        9 => decimal(input, at, random),
        11 | 12 => token(input, random.pick::<Vec<u8>>(others), words, random),
        10 if !words.is_empty() => {
            let word = *random.pick(words);
            let end = match random.below(2) {
                0 => at,
                _ => (at + word.len()).min(input.len()),
            };
            input.splice(at..end, word.iter().copied());
        }
        _ => {
            let from = random.below(input.len());
            let bytes = random.length(64).min(input.len() - from.max(at));
            let piece = input[from..from + bytes].to_vec();
            input[at..at + bytes].copy_from_slice(&piece);
        }
    }
}

/// Anywhere, but more often near an end: that is where formats say what is in between.
fn place(bytes: usize, random: &mut Random) -> usize {
    let end = bytes.min(ENDS_BYTES);
    match random.below(4) {
        0 => random.below(end),
        1 => bytes - end + random.below(end),
        _ => random.below(bytes),
    }
}

/// Puts a piece of another input over, or between, what is at `at`.
fn splice(input: &mut Vec<u8>, other: &[u8], at: usize, random: &mut Random) {
    let from = random.below(other.len());
    let to = from + random.length(other.len().max(1)).min(other.len() - from);
    let end = match random.below(3) {
        0 => at,
        1 => (at + (to - from)).min(input.len()),
        _ => input.len(),
    };
    input.splice(at..end, other[from..to].iter().copied());
}

/// Writes, or adds a little to, a binary number of any width and order.
fn number(input: &mut [u8], at: usize, random: &mut Random) {
    let width = 1 << random.below(4);
    let Some(field) = input.get_mut(at..at + width) else {
        return;
    };
    let is_big = random.below(2) == 0;
    let mut bytes = [0; 8];
    for (index, byte) in field.iter().enumerate() {
        bytes[if is_big { width - 1 - index } else { index }] = *byte;
    }
    let value = match random.below(3) {
        0 => u64::from_le_bytes(bytes)
            .wrapping_add(random.below(17) as u64)
            .wrapping_sub(8),
        1 => random
            .pick(&NUMBERS)
            .wrapping_add(random.below(3) as u64)
            .wrapping_sub(1),
        _ => *random.pick(&NUMBERS),
    };
    let bytes = value.to_le_bytes();
    for (index, byte) in field.iter_mut().enumerate() {
        *byte = bytes[if is_big { width - 1 - index } else { index }];
    }
}

/// Whether a byte stands between the words of a text format.
fn divides(byte: u8) -> bool {
    byte.is_ascii_whitespace() || b"\"{}[],:;=/@<>".contains(&byte)
}

/// Where a word of a text starts and ends.
fn any_token(text: &[u8], random: &mut Random) -> (usize, usize) {
    let at = random.below(text.len());
    let start = text[..at]
        .iter()
        .rposition(|&byte| divides(byte))
        .map_or(0, |before| before + 1);
    let end = text[at..]
        .iter()
        .position(|&byte| divides(byte))
        .map_or(text.len(), |after| at + after);
    (start, end.max(start))
}

/// Replaces a word of a text by one of another text, or by one of the format, so that what stands around it holds.
fn token(input: &mut Vec<u8>, other: &[u8], words: &[&[u8]], random: &mut Random) {
    let (start, end) = any_token(input, random);
    let new = match random.below(3) {
        0 if !words.is_empty() => random
            .pick(words)
            .iter()
            .copied()
            .filter(|&byte| !divides(byte))
            .collect(),
        1 => random.pick(&DECIMALS).to_vec(),
        _ => {
            let (from, to) = any_token(other, random);
            other[from..to].to_vec()
        }
    };
    input.splice(start..end, new);
}

/// Replaces the next number in digits.
fn decimal(input: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(start) = input[at..].iter().position(u8::is_ascii_digit) else {
        return;
    };
    let start = at + start;
    let digits = input[start..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let new = match random.below(2) {
        0 => random.pick(&DECIMALS).to_vec(),
        _ => {
            let text = String::from_utf8_lossy(&input[start..start + digits]);
            let number = text.parse::<u64>().unwrap_or(0);
            let near = number.wrapping_add(random.below(5) as u64).wrapping_sub(2);
            near.to_string().into_bytes()
        }
    };
    input.splice(start..start + digits, new);
}
