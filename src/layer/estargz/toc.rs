//! Takes the TOC out of its container: a gzip member that holds a tar with one file, and nothing besides.
//!
//! Everything is strict, because two readers that find different TOCs in the same bytes see different images. The caps
//! bound what a registry can make us hold before the digest has been checked.

use std::io::Read;

use flate2::bufread::GzDecoder;

use super::TOC_NAME;
use crate::error::{Error, Result};
use crate::layer::spool::{self, Spool, Spooled};
use crate::layer::tar;
use crate::layer::toc_json::json_bytes_max;

/// The most zero bytes after the TOC in its tar: some writers fill up to a record of 10 KiB.
const ZEROS_BYTES_MAX: u64 = 64 << 10;

fn malformed(why: impl Into<String>) -> Error {
    Error::malformed("eStargz TOC", why)
}

/// Unpacks the TOC from exactly its gzip member, which is here in two parts, and returns its JSON in `spool`.
///
/// # Errors
/// [`Error::Malformed`] when the bytes are anything but that, or beyond the caps; those of the spool.
pub(in crate::layer) fn unpack(compressed: [&[u8]; 2], mut spool: Box<dyn Spool>) -> Result<Spooled> {
    let [first, second] = compressed;
    let compressed_bytes = first.len() + second.len();
    let mut gzip = GzDecoder::new(first.chain(second));
    let mut header = [0; tar::BLOCK_BYTES];
    let broken = |e: std::io::Error| malformed(format!("its gzip member cannot be decoded: {e}"));
    gzip.read_exact(&mut header).map_err(broken)?;
    let json_bytes = tar::read_plain_header(&header, TOC_NAME.as_bytes()).map_err(malformed)?;
    if json_bytes > json_bytes_max(compressed_bytes as u64) {
        let why = format!("{json_bytes} bytes from {compressed_bytes} compressed ones are too many");
        return Err(malformed(why));
    }
    if spool::copy(&mut gzip, json_bytes, &mut *spool, broken)? != json_bytes {
        return Err(malformed("its tar ends within it"));
    }
    let mut zeros = Vec::new();
    gzip.by_ref()
        .take(ZEROS_BYTES_MAX + 1)
        .read_to_end(&mut zeros)
        .map_err(broken)?;
    if zeros.len() as u64 > ZEROS_BYTES_MAX || zeros.iter().any(|&byte| byte != 0) {
        return Err(malformed("something follows it in its tar"));
    }
    let (first, second) = gzip.into_inner().into_inner();
    if !first.is_empty() || !second.is_empty() {
        return Err(malformed("something follows its gzip member"));
    }
    spool.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;
    use crate::layer::entry::{Entry, Kind};
    use crate::layer::toc_json::JSON_BYTES_MAX;

    /// Unpacks what comes in two parts, cut somewhere.
    fn unpack(compressed: &[u8]) -> Result<Vec<u8>> {
        let (first, second) = compressed.split_at(compressed.len() / 3);
        super::unpack([first, second], Box::new(Vec::new())).map(|json| json.to_vec())
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn tar(entry: &Entry, payload: &[u8], end: &[u8]) -> Vec<u8> {
        let padding = vec![0; tar::padding(payload.len() as u64)];
        [&tar::header(entry).unwrap(), payload, &padding, end].concat()
    }

    fn toc_entry(size: u64) -> Entry {
        Entry {
            size,
            ..Entry::new(TOC_NAME, Kind::File)
        }
    }

    #[test]
    fn the_payload_comes_out_whole() {
        for end in [0, 1024, 10240] {
            let member = gzip(&tar(&toc_entry(3), b"{ }", &vec![0; end]));
            assert_eq!(unpack(&member).unwrap(), b"{ }");
        }
    }

    #[test]
    fn another_container_is_refused() {
        let end = [0; 1024];
        let good = tar(&toc_entry(3), b"{ }", &end);
        let second = tar(&Entry::new("b", Kind::File), b"", &end);
        let mut wrong_sum = good.clone();
        wrong_sum[148] ^= 1;
        let renamed = Entry {
            path: b"./stargz.index.json".to_vec(),
            ..toc_entry(3)
        };
        let link = Entry {
            link: b"x".to_vec(),
            ..Entry::new(TOC_NAME, Kind::Symlink)
        };
        let extended = Entry {
            xattrs: vec![(b"user.a".to_vec(), vec![])],
            ..toc_entry(3)
        };
        let cases: [(&str, Vec<u8>); 12] = [
            ("empty", vec![]),
            ("no gzip", good.clone()),
            ("cut in the header", gzip(&good[..100])),
            ("cut in the payload", gzip(&good[..514])),
            ("cut in gzip", gzip(&good)[..40].to_vec()),
            ("renamed", gzip(&tar(&renamed, b"{ }", &end))),
            ("symlink", gzip(&tar(&link, b"", &end))),
            ("PAX records", gzip(&tar(&extended, b"{ }", &end))),
            ("wrong checksum", gzip(&wrong_sum)),
            ("another entry behind", gzip(&tar(&toc_entry(3), b"{ }", &second))),
            ("another member behind", [gzip(&good), gzip(&[0; 512])].concat()),
            (
                "endless zeros",
                gzip(&tar(&toc_entry(3), b"{ }", &vec![0; 70_000])),
            ),
        ];
        for (name, member) in cases {
            assert!(matches!(unpack(&member), Err(Error::Malformed { .. })), "{name}");
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_inflated() {
        let bomb = vec![b' '; 20 << 20];
        let refused = unpack(&gzip(&tar(&toc_entry(20 << 20), &bomb, &[])));
        assert!(refused.unwrap_err().to_string().contains("too many"));
        let mut claimed = gzip(&tar::header(&toc_entry(JSON_BYTES_MAX + 1)).unwrap());
        claimed.resize(9 << 20, 0);
        assert!(unpack(&claimed).unwrap_err().to_string().contains("too many"));
        let free = vec![b' '; 16 << 20];
        assert_eq!(
            unpack(&gzip(&tar(&toc_entry(16 << 20), &free, &[]))).unwrap(),
            free
        );
    }
}
