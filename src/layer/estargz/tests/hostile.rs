//! What a registry may send: records that are odd but valid, and ways to break the format that bit readers.
//!
//! What only the merged tree can judge (hard links to nothing, in circles, to directories; files with children) passes
//! here and is refused or resolved there.

use serde_json::{Value, json};

use super::super::*;
use super::{blob_with_toc, index_blob, index_edited};

/// What is changed in the records of the small layer, and a name for it.
type Case = (&'static str, fn(&mut Vec<Value>));

fn all_are_refused(cases: &[Case]) {
    for (name, edit) in cases {
        let outcome = index_edited(edit);
        assert!(
            matches!(outcome, Err(Error::Malformed { .. })),
            "{name}: {outcome:?}"
        );
    }
}

#[test]
fn odd_but_valid_records_are_accepted() {
    let accepted: [Case; 12] = [
        ("unknown key", |e| e[1]["NumLink"] = json!(2)),
        ("null values", |e| {
            e[0]["xattrs"] = Value::Null;
            e[0]["modtime"] = Value::Null;
        }),
        ("type in the mode", |e| e[0]["mode"] = json!(0o40755)),
        ("digest instead of chunkDigest", |e| {
            e[4]["digest"] = e[4]["chunkDigest"].take();
        }),
        ("a chunk with another name", |e| e[2]["name"] = json!("other")),
        ("name cleaned to the root", |e| e[0]["name"] = json!("/./..")),
        ("hard link to nothing", |e| e[6]["linkName"] = json!("missing")),
        ("hard link to itself", |e| e[6]["linkName"] = json!("h")),
        ("hard link to a directory", |e| e[6]["linkName"] = json!("d")),
        ("the same name twice", |e| e[4]["name"] = json!("d/a")),
        ("a file with children", |e| {
            e[0] = json!({"name": "d", "type": "reg"});
        }),
        ("empty type of mode", |e| e[5]["mode"] = json!(0)),
    ];
    for (name, edit) in accepted {
        let outcome = index_edited(edit);
        assert!(outcome.is_ok(), "{name}: {outcome:?}");
    }
    // Go writes an empty slice as null.
    let empty = br#"{"version":1,"entries":null}"#;
    assert!(index_blob(&blob_with_toc(b"member", empty), Some(Digest::of(empty))).is_ok());
}

#[test]
fn chunks_that_do_not_make_up_their_file_are_refused() {
    let refused: [Case; 22] = [
        ("chunk before any file", |e| e.swap(0, 2)),
        ("chunk after a directory", |e| {
            e.push(json!({"name": "d", "type": "chunk", "offset": 9, "chunkSize": 1}));
        }),
        ("chunk after a whole file", |e| {
            e.insert(
                5,
                json!({"name": "b", "type": "chunk", "offset": 9, "chunkOffset": 3}),
            );
        }),
        ("chunk after an empty file", |e| {
            e.push(json!({"name": "e", "type": "reg"}));
            e.push(json!({"name": "e", "type": "chunk", "offset": 9}));
        }),
        ("chunks out of order", |e| e.swap(2, 3)),
        ("chunk overlapping", |e| e[2]["chunkOffset"] = json!(3)),
        ("chunk after a gap", |e| e[2]["chunkOffset"] = json!(5)),
        ("chunk missing", |e| drop(e.remove(2))),
        ("last chunk missing", |e| drop(e.remove(3))),
        ("chunk twice", |e| e.insert(2, e[2].clone())),
        ("negative chunk offset", |e| e[2]["chunkOffset"] = json!(-4)),
        ("negative size", |e| e[1]["size"] = json!(-1)),
        ("negative offset", |e| e[1]["offset"] = json!(-1)),
        ("fraction", |e| e[1]["size"] = json!(10.0)),
        ("chunk beyond the file", |e| e[2]["chunkSize"] = json!(7)),
        ("huge chunk", |e| e[1]["chunkSize"] = json!(i64::MAX)),
        ("huge file", |e| e[4]["size"] = json!(i64::MAX)),
        ("data at nothing", |e| {
            drop(e[4].as_object_mut().unwrap().remove("offset"));
        }),
        ("data in the TOC", |e| e[4]["offset"] = json!(100_000)),
        ("deep in its member", |e| {
            e[4]["innerOffset"] = json!((1u64 << 30) + 1);
        }),
        ("same bytes, two digests", |e| {
            e[4]["offset"] = e[1]["offset"].clone();
            e[4]["size"] = json!(4);
        }),
        ("overlapping in the member", |e| {
            e[4]["offset"] = e[1]["offset"].clone();
            e[4]["innerOffset"] = json!(2);
        }),
    ];
    all_are_refused(&refused);
}

#[test]
fn names_that_linux_cannot_show_are_refused() {
    let refused: [Case; 8] = [
        ("NUL in a name", |e| e[0]["name"] = json!("a\0b")),
        ("NUL in a symlink", |e| e[5]["linkName"] = json!("a\0b")),
        ("NUL in a hard link", |e| e[6]["linkName"] = json!("a\0b")),
        ("long component", |e| e[0]["name"] = json!("x".repeat(256))),
        ("long path", |e| {
            e[0]["name"] = json!(format!("{}/", "x".repeat(200)).repeat(21));
        }),
        ("deep path", |e| e[0]["name"] = json!("x/".repeat(1001))),
        ("empty symlink", |e| e[5]["linkName"] = json!("")),
        ("long symlink", |e| e[5]["linkName"] = json!("x".repeat(4096))),
    ];
    all_are_refused(&refused);
}

#[test]
fn attributes_that_linux_cannot_have_are_refused() {
    let refused: [Case; 6] = [
        ("long xattr name", |e| {
            e[0]["xattrs"] = json!({("x".repeat(256)): ""});
        }),
        ("long xattr value", |e| {
            e[0]["xattrs"] = json!({"user.x": "AAAA".repeat(22_000)});
        }),
        ("long xattr list", |e| {
            let names = (0..300).map(|n| (format!("user.{n:0245}"), json!("")));
            e[0]["xattrs"] = Value::Object(names.collect());
        }),
        ("broken base64", |e| e[0]["xattrs"] = json!({"user.x": "A"})),
        ("large uid", |e| e[0]["uid"] = json!(1u64 << 32)),
        ("negative gid", |e| e[0]["gid"] = json!(-1)),
    ];
    all_are_refused(&refused);
}

#[test]
fn records_of_unknown_meaning_are_refused() {
    let refused: [Case; 7] = [
        ("another digest algorithm", |e| {
            e[4]["chunkDigest"] = json!(format!("sha512:{}", "0".repeat(128)));
        }),
        ("another file digest algorithm", |e| {
            e[4]["digest"] = json!("md5:00");
        }),
        ("unknown type", |e| e[0]["type"] = json!("whiteout")),
        ("no type", |e| drop(e[0].as_object_mut().unwrap().remove("type"))),
        ("no time", |e| e[0]["modtime"] = json!("yesterday")),
        ("null entry", |e| e[0] = Value::Null),
        ("key in another case", |e| e[4]["Size"] = json!(3)),
    ];
    all_are_refused(&refused);
}

#[test]
fn a_refusal_does_not_repeat_megabytes() {
    let edits: [fn(&mut Vec<Value>); 5] = [
        |e| e[0]["name"] = json!("x".repeat(1 << 20)),
        |e| e[0]["mode"] = json!("x".repeat(1 << 20)),
        |e| e[4]["digest"] = json!("x".repeat(1 << 20)),
        |e| e[4]["chunkDigest"] = json!("x".repeat(1 << 20)),
        |e| e[0]["type"] = json!("x".repeat(1 << 20)),
    ];
    for edit in edits {
        assert!(index_edited(edit).unwrap_err().to_string().len() < 1000);
    }
}

#[test]
fn json_that_readers_understand_differently_is_refused() {
    let refused = [
        r#"{"version":1,"entries":[]} "x""#,
        r#"{"version":1,"entries":[]}{}"#,
        r#"{"version":2,"entries":[]}"#,
        r#"{"entries":[]}"#,
        r#"{"version":1}"#,
        r#"{"version":1,"version":1,"entries":[]}"#,
        r#"{"version":1,"entries":[],"entries":[]}"#,
        r#"{"version":1,"Entries":[],"entries":[]}"#,
        r#"{"version":1,"entrie\u017f":[],"entries":[]}"#,
        r#"{"version":1,"entries":[{"name":"a","name":"b","type":"dir"}]}"#,
        r#"{"version":1,"entries":[{"name":"a","type":"dir","lin\u212aName":"b"}]}"#,
        r#"{"version":1,"entries":[{"name":"a","type":"dir","xattrs":{"a":"","a":""}}]}"#,
        r#"{"version":1,"entries":{}}"#,
        r#"{"version":1,"entries":["#,
        "[]",
        "",
        "\u{feff}{}",
    ];
    for json in refused {
        let blob = blob_with_toc(b"member", json.as_bytes());
        let outcome = index_blob(&blob, Some(Digest::of(json.as_bytes())));
        assert!(
            matches!(outcome, Err(Error::Malformed { .. })),
            "{json}: {outcome:?}"
        );
    }
    let deep = format!(
        r#"{{"x":{}{},"version":1,"entries":[]}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let blob = blob_with_toc(b"member", deep.as_bytes());
    assert!(
        index_blob(&blob, Some(Digest::of(deep.as_bytes()))).is_ok(),
        "nesting costs stack"
    );
}
