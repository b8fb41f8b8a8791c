//! Changes of inputs.

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than the bound, or 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % (bound.max(1) as u64)).unwrap_or(0)
    }
}

/// Bytes that mean something to parsers.
const BYTES: &[u8] = b"\0\x01\x7f\x80\xff\n\r\t \"'\\#;=[]{}(),:./@%*?-_+0123456789aZ";
/// The same as texts.
const TEXTS: &[&str] = &[
    "\r\n",
    "\\\n",
    "\n\n",
    "\"\"",
    "\\u0000",
    "\u{feff}",
    "\u{2028}",
    "é",
    "%n",
    "%i",
    "%%",
    "/../",
    "null",
    "true",
    "[]",
    "{}",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "99999999999999999999",
    "4294967296",
    "65536",
];

/// An input made of others: one of them, changed in a few places.
pub(crate) fn mutated(rng: &mut Rng, pool: &[Vec<u8>], words: &[&str], longest: usize) -> Vec<u8> {
    let mut input = pool.get(rng.below(pool.len())).cloned().unwrap_or_default();
    // Mostly few changes, now and then many.
    let most = 1 << rng.below(5);
    let changes = 1 + rng.below(most);
    for _ in 0..changes {
        change(rng, &mut input, pool, words);
    }
    input.truncate(longest);
    input
}

fn change(rng: &mut Rng, input: &mut Vec<u8>, pool: &[Vec<u8>], words: &[&str]) {
    let (at, length) = range(rng, input.len());
    match rng.below(10) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << rng.below(8);
            }
        }
        1 => {
            if let Some(byte) = input.get_mut(at) {
                *byte = BYTES[rng.below(BYTES.len())];
            }
        }
        2 => input.insert(at, BYTES[rng.below(BYTES.len())]),
        3 => drop(input.drain(at..at + length)),
        // Again, maybe often: lists and nesting.
        4 => {
            let times = 1 << rng.below(6);
            let part = input[at..at + length].repeat(times);
            put(input, at, &part);
        }
        // From one place to another.
        5 => {
            let part: Vec<u8> = input.drain(at..at + length).collect();
            let to = rng.below(input.len() + 1);
            put(input, to, &part);
        }
        // From another input.
        6 | 7 => {
            if let Some(other) = pool.get(rng.below(pool.len())) {
                let (from, length) = range(rng, other.len());
                put(input, at, &other[from..from + length]);
            }
        }
        8 => put(input, at, TEXTS[rng.below(TEXTS.len())].as_bytes()),
        _ => {
            if !words.is_empty() {
                put(input, at, words[rng.below(words.len())].as_bytes());
            }
        }
    }
}

fn put(input: &mut Vec<u8>, at: usize, part: &[u8]) {
    input.splice(at..at, part.iter().copied());
}

/// A place in something of this length, and how much to take from there: mostly little.
fn range(rng: &mut Rng, length: usize) -> (usize, usize) {
    let at = rng.below(length + 1);
    let most = 1 << rng.below(9);
    (at, rng.below((length - at).min(most) + 1))
}
