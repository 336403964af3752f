//! `hosts.toml` against its documentation, and against a model: whatever the order and the form of the tables, the
//! endpoints come in the order in which the file first names them.

use super::*;
use proptest::prelude::*;

fn parsed(text: &str) -> HostsFile {
    HostsFile::parse(text, Path::new("/etc/h/hosts.toml")).unwrap()
}

fn refused(text: &str) -> String {
    let error = HostsFile::parse(text, Path::new("/etc/h/hosts.toml")).unwrap_err();
    assert!(matches!(error, Error::Usage { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn everything_that_the_documentation_shows() {
    let file = parsed(
        r#"
server = "https://registry-1.docker.io"
ca = "server.pem"
[host."https://mirror.registry"]
  capabilities = ["pull"]
  ca = ["/etc/certs/a.pem", "b.pem"]
  skip_verify = false
  dial_timeout = "1m1.5s"
  proxy = "http://user:secret@p.example:3128"
  [host."https://mirror.registry".header]
    x-custom-1 = ["value1", "value2"]
    x-custom-2 = "value3"
[host."http://mirror-bak.registry/us"]
  client = [["c.cert", "/k/c.key"], ["both.pem", ""]]
[host."https://one.registry/v2/upstream"]
  client = "one.pem"
  override_path = true
[host."https://list.registry"]
  client = ["one.pem", "two.pem"]
  dial_timeout = "0"
"#,
    );
    assert_eq!(file.server.unwrap().host, "registry-1.docker.io");
    assert_eq!(file.server_said.ca, [PathBuf::from("/etc/h/server.pem")]);
    let [first, second, third, fourth] = &file.hosts[..] else {
        panic!("{:?}", file.hosts)
    };
    let pull_only = Capabilities {
        pull: true,
        resolve: false,
    };
    assert_eq!(first.capabilities, pull_only);
    assert_eq!(
        first.said.ca,
        ["/etc/certs/a.pem", "/etc/h/b.pem"].map(PathBuf::from)
    );
    assert_eq!(first.said.insecure, Some(false));
    assert_eq!(first.said.connect, Some(Duration::from_millis(61_500)));
    let custom: Vec<_> = first.said.headers.get_all("X-Custom-1").iter().collect();
    assert_eq!(custom, ["value1", "value2"]);
    let shown = format!("{first:?}");
    assert!(!shown.contains("secret") && !shown.contains("value"), "{shown}");
    let pair = |certificate: &str, key: Option<&str>| (PathBuf::from(certificate), key.map(PathBuf::from));
    assert_eq!(
        second.said.client,
        [
            pair("/etc/h/c.cert", Some("/k/c.key")),
            pair("/etc/h/both.pem", None)
        ]
    );
    assert_eq!(second.base.path, "/us/v2");
    assert_eq!(third.base.path, "/v2/upstream");
    assert_eq!(third.said.client, [pair("/etc/h/one.pem", None)]);
    assert_eq!(fourth.said.client.len(), 2);
    assert_eq!(fourth.said.connect, None);
    assert_eq!(fourth.capabilities, Capabilities::ALL);
}

#[test]
fn a_mistake_is_named_with_its_line() {
    let cases = [
        ("\n\nserver = 7", 3),
        ("server = \"x\n", 1),
        ("server = \"ftp://x\"", 1),
        ("\n[host.\"https://u:hunter2@x.example\"]", 2),
        ("[host.\"https://x\"]\ncapabilities = [\"sing\"]", 2),
        ("[host.\"https://x\"]\n\ndial_timeout = \"soon\"", 3),
        ("[host.\"https://x\"]\nca = 3", 2),
        ("[host.\"https://x\"]\nclient = [[\"a\"]]", 2),
        ("[host.\"https://x\"]\nproxy = \"http://user:hunter2@/\"", 2),
        ("[host.\"https://x\".header]\n\"bad name\" = \"hunter2\"", 1),
        ("[host.\"https://x\".header]\nx = 1", 2),
        ("[host.\"https://x\"]\nheader = \"hunter2\"", 2),
    ];
    for (text, line) in cases {
        let error = refused(text);
        assert!(
            error.starts_with(&format!("/etc/h/hosts.toml:{line}: ")),
            "{text}: {error}"
        );
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn unknown_keys_do_not_hide_the_mirrors() {
    let file = parsed("future = 1\n[host.\"https://m.example\"]\nfuture = 2\n");
    assert_eq!(file.hosts.len(), 1);
}

#[test]
fn an_empty_or_absent_file_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hosts.toml");
    assert_eq!(HostsFile::read(&path).unwrap(), None);
    std::fs::write(&path, "\n").unwrap();
    assert_eq!(HostsFile::read(&path).unwrap(), None);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let error = HostsFile::read(&path).unwrap_err();
    assert!(error.to_string().contains("hosts.toml"), "{error}");
}

/// How a host's table is written: its own table, or only a table below it.
#[derive(Debug, Clone)]
struct Written {
    header_first: bool,
    capabilities: u8,
}

fn written() -> impl Strategy<Value = Vec<(String, Written)>> {
    let table = (any::<bool>(), 0u8..4).prop_map(|(header_first, capabilities)| Written {
        header_first,
        capabilities,
    });
    proptest::collection::btree_map("[a-z]{1,6}(\\.[a-z]{1,4}){0,2}", table, 0..12)
        .prop_map(|tables| tables.into_iter().collect::<Vec<_>>())
        .prop_shuffle()
}

proptest! {
    #[test]
    fn hosts_come_in_the_order_of_the_file(tables in written(), server in any::<bool>()) {
        let mut text = String::from(if server { "server = \"https://s.example\"\n" } else { "" });
        for (name, Written { header_first, capabilities }) in &tables {
            let words = ["[]", "[\"pull\"]", "[\"resolve\", \"push\"]", "[\"pull\", \"resolve\"]"];
            let own = format!("[host.\"https://{name}\"]\ncapabilities = {}\n", words[usize::from(*capabilities)]);
            let header = format!("[host.\"https://{name}\".header]\nx-name = \"{name}\"\n");
            match header_first {
                true => text.push_str(&format!("{header}{own}")),
                false => text.push_str(&format!("{own}{header}")),
            }
        }
        let file = parsed(&text);
        prop_assert_eq!(file.server.is_some(), server);
        let order: Vec<&str> = file.hosts.iter().map(|host| host.base.host.as_str()).collect();
        let expected: Vec<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
        prop_assert_eq!(order, expected);
        for (host, (name, written)) in file.hosts.iter().zip(&tables) {
            prop_assert_eq!(&host.said.headers["x-name"], name.as_str());
            let pull = matches!(written.capabilities, 0 | 1 | 3);
            let resolve = matches!(written.capabilities, 0 | 2 | 3);
            prop_assert_eq!(host.capabilities, Capabilities { pull, resolve });
        }
    }

    #[test]
    fn any_text_is_survived(text in "\\PC{0,200}") {
        let _ = HostsFile::parse(&text, Path::new("hosts.toml"));
    }

    #[test]
    fn times_as_go_writes_them(hours in 0u64..100, minutes in 0u64..60, ms in 0u64..60_000) {
        let text = format!("{hours}h{minutes}m{ms}ms");
        let expected = Duration::from_millis((hours * 60 + minutes) * 60_000 + ms);
        let read = parse_go_duration(&text).unwrap();
        prop_assert!(read.abs_diff(expected) < Duration::from_micros(1), "{:?}", read);
    }

    #[test]
    fn no_time_is_survived(text in "[0-9.smhnu+-]{0,12}") {
        let _ = parse_go_duration(&text);
    }
}
