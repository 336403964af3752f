use super::*;
#[test]
fn smoke() {
    let l = layer(&[Entry::new("a/b", Kind::File), Entry::new("c", Kind::Dir)]);
    let (t, w) = merged(&[l], Whiteouts::Apply);
    walk(&t, &mut |p, n| println!("{} {:?}", String::from_utf8_lossy(p), n));
    println!("{w:?}");
    assert_eq!(t.resolve(b"/a/b", true).unwrap(), 2);
    assert_eq!(t.path_of(2).unwrap(), b"a/b");
}
