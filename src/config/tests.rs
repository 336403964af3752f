//! Files, environment and flags as their users write them, and which of them wins.

use std::ffi::OsString;
use std::fs;

use super::*;

fn environment(dir: &Path, variables: &[(&str, &str)]) -> Environment {
    Environment {
        variables: variables
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value)))
            .collect(),
        is_root: false,
        system_file: dir.join("system.toml"),
    }
}

#[test]
fn each_source_wins_over_those_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let user_dir = dir.path().join("xdg");
    fs::create_dir_all(user_dir.join("registryfs")).unwrap();
    let set = |name: &str, from: u32| {
        let keys: String = [
            "retries",
            "tag_ttl_s",
            "timeout_s",
            "concurrency",
            "lookup_wait_s",
        ]
        .iter()
        .skip(usize::try_from(from).unwrap())
        .map(|key| format!("{key} = {}\n", from + 1))
        .collect();
        fs::write(dir.path().join(name), keys).unwrap();
    };
    // Every key is named by all sources up to its own, so that each value tells which source won.
    fs::write(
        dir.path().join("system.toml"),
        "retries = 1\ntag_ttl_s = 1\ntimeout_s = 1\nconcurrency = 1\nlookup_wait_s = 1\n",
    )
    .unwrap();
    set("xdg/registryfs/config.toml", 1);
    set("explicit.toml", 2);
    let xdg = user_dir.to_str().unwrap().to_owned();
    let environment = environment(
        dir.path(),
        &[
            ("HOME", "/home/u"),
            ("XDG_CONFIG_HOME", &xdg),
            ("REGISTRYFS_CONCURRENCY", "4"),
            ("REGISTRYFS_LOOKUP_WAIT", "4"),
        ],
    );
    let flags = Layer {
        lookup_wait_s: Some(5),
        ..Layer::default()
    };
    let explicit = dir.path().join("explicit.toml");
    let loaded = Config::load(&environment, Some(&explicit), flags).unwrap();
    let config = loaded.config;
    assert_eq!(config.retries, 1, "the system's file");
    assert_eq!(config.tag_ttl, Duration::from_secs(2), "the user's file");
    assert_eq!(config.timeout, Duration::from_secs(3), "--config");
    assert_eq!(config.concurrency, 4, "the environment");
    assert_eq!(config.lookup_wait, Duration::from_secs(5), "the flag");
    assert_eq!(config.cache_dir, Path::new("/home/u/.cache/registryfs"));
    assert_eq!(
        (loaded.given.retries, loaded.given.timeout_s),
        (None, Some(3)),
        "only what the invocation named counts as given"
    );
}

#[test]
fn registry_tables_merge_by_field_and_paths_start_at_their_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("system.toml"),
        "[registry.\"r.example\"]\ninsecure = true\nca = [\"low.pem\"]\n",
    )
    .unwrap();
    let explicit = dir.path().join("c.toml");
    let text = "budget = \"2 GiB\"\ncache_dir = \"store\"\n[registry.\"r.example\"]\nca = [\"ca.pem\"]\n";
    fs::write(&explicit, text).unwrap();
    let environment = environment(dir.path(), &[]);
    let config = Config::load(&environment, Some(&explicit), Layer::default())
        .unwrap()
        .config;
    let entry = &config.registries["r.example"];
    assert_eq!(entry.insecure, Some(true));
    assert_eq!(entry.ca, Some(vec![dir.path().join("ca.pem")]));
    assert_eq!(config.budget_bytes, Some(2 << 30));
    assert_eq!(config.cache_dir, dir.path().join("store"));
}

#[test]
fn mirrors_are_taken_from_one_file_whole_and_in_its_order() {
    let dir = tempfile::tempdir().unwrap();
    let environment = environment(dir.path(), &[("HOME", "/home/u")]);
    let low = r#"
        [registry."r.example"]
        server = "https://s.example"
        [[registry."r.example".mirror]]
        url = "low.example"
    "#;
    fs::write(&environment.system_file, low).unwrap();
    let file = dir.path().join("own.toml");
    let text = r#"
        certs_dirs = ["certs.d"]
        [registry."r.example"]
        client_cert = "me.pem"
        proxy = "http://u:hunter2@p.example"
        [[registry."r.example".mirror]]
        url = "https://b.example"
        capabilities = ["pull"]
        ca = ["b.pem"]
        header = { x = "hunter2" }
        [[registry."r.example".mirror]]
        url = "http://a.example"
        client_cert = "a.pem"
        client_key = "/k/a.key"
    "#;
    fs::write(&file, text).unwrap();
    let config = Config::load(&environment, Some(&file), Layer::default())
        .unwrap()
        .config;
    let entry = &config.registries["r.example"];
    assert_eq!(entry.server.as_deref(), Some("https://s.example"));
    assert_eq!(entry.client_cert, Some(dir.path().join("me.pem")));
    let [first, second] = entry.mirror.as_deref().unwrap() else {
        panic!("{entry:?}")
    };
    assert_eq!(
        (first.url.as_str(), second.url.as_str()),
        ("https://b.example", "http://a.example")
    );
    assert_eq!(first.ca, Some(vec![dir.path().join("b.pem")]));
    assert_eq!(second.client_cert, Some(dir.path().join("a.pem")));
    assert_eq!(second.client_key, Some(PathBuf::from("/k/a.key")));
    assert_eq!(config.certs_dirs, [dir.path().join("certs.d")]);
    assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
    let none = Layer::parse("[registry.\"r.example\"]\nmirror = []", "x").unwrap();
    assert_eq!(config.conflicts(&none), ["[registry]"]);
    let elsewhere = Layer {
        certs_dirs: Some(vec![PathBuf::from("/other")]),
        ..Layer::default()
    };
    assert_eq!(config.conflicts(&elsewhere), ["certs_dirs"]);
    for unknown in ["urls = 1", "url = \"m\"\nserver = \"s\""] {
        let text = format!("[[registry.\"r.example\".mirror]]\n{unknown}");
        assert!(Layer::parse(&text, "x").is_err(), "{unknown}");
    }
}

#[test]
fn other_tools_directories_are_looked_into_an_ordinary_users_own_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut environment = environment(dir.path(), &[("HOME", "/home/u")]);
    let dirs = |environment: &Environment| {
        let config = Config::load(environment, None, Layer::default()).unwrap().config;
        config.certs_dirs.len()
    };
    environment.is_root = true;
    assert_eq!(dirs(&environment), 3);
    environment.is_root = false;
    assert_eq!(dirs(&environment), 6);
    let config = Config::load(&environment, None, Layer::default()).unwrap().config;
    assert_eq!(
        config.certs_dirs[0],
        Path::new("/home/u/.config/containerd/certs.d")
    );
    assert_eq!(config.certs_dirs[3], Path::new("/etc/containerd/certs.d"));
}

#[test]
fn the_cache_lies_where_systemd_says_then_where_the_user_may_write() {
    let dir = tempfile::tempdir().unwrap();
    let cache_dir = |variables: &[(&str, &str)], is_root: bool| {
        let environment = Environment {
            is_root,
            ..environment(dir.path(), variables)
        };
        Config::load(&environment, None, Layer::default()).map(|loaded| loaded.config.cache_dir)
    };
    let systemd = ("CACHE_DIRECTORY", "/var/cache/a:/var/cache/b");
    assert_eq!(cache_dir(&[systemd], true).unwrap(), Path::new("/var/cache/a"));
    assert_eq!(cache_dir(&[], true).unwrap(), Path::new("/var/cache/registryfs"));
    let xdg = ("XDG_CACHE_HOME", "/x");
    assert_eq!(cache_dir(&[xdg], false).unwrap(), Path::new("/x/registryfs"));
    assert_eq!(cache_dir(&[], false).unwrap_err().exit_code(), 2);
}

#[test]
fn layouts_are_found_from_the_file_that_names_them_and_the_upper_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let sources = ["oci:images", "oci:../x:a:1", "oci:/abs:1", "oci:", "debian:12"];
    let mounts: String = sources
        .iter()
        .map(|source| format!("[[mount]]\nmountpoint = \"m\"\nsource = {source:?}\n"))
        .collect();
    let system = format!("[layout.\"a.b\"]\npath = \"a\"\n[layout.\"c.d\"]\npath = \"/c\"\n{mounts}");
    fs::write(dir.path().join("system.toml"), system).unwrap();
    let upper = dir.path().join("upper.toml");
    fs::write(&upper, "[layout.\"c.d\"]\npath = \"d\"\n").unwrap();
    let environment = environment(dir.path(), &[("HOME", "/h")]);
    let Loaded { config, given, .. } = Config::load(&environment, Some(&upper), Layer::default()).unwrap();
    let at = |name: &str| dir.path().join(name);
    let expected = [("a.b", at("a")), ("c.d", at("d"))].map(|(name, path)| (name.to_owned(), path));
    assert_eq!(config.layouts, expected.into());
    let found: Vec<_> = config
        .mounts
        .iter()
        .filter_map(|mount| mount.source.clone())
        .collect();
    let path = dir.path().display();
    assert_eq!(
        found,
        [
            &format!("oci:{path}/images"),
            &format!("oci:{path}/../x:a:1"),
            "oci:/abs:1",
            "oci:",
            "debian:12"
        ]
    );
    assert!(config.conflicts(&given).is_empty());
    let other = Layer::parse("[layout.\"c.d\"]\npath = \"/e\"\n", "f").unwrap();
    assert_eq!(config.conflicts(&other), ["[layout]"]);
}

#[test]
fn errors_name_the_file_the_line_and_the_key() {
    let cases = [
        ("retries = 1\nretreis = 2\n", "f.toml:2:", "retreis"),
        ("\n\ntag_ttl_s = \"x\"\n", "f.toml:3:", "tag_ttl_s"),
        ("credential = \"u:p\"\n", "f.toml:1:", "credential"),
        ("budget = \"many\"\n", "f.toml:1:", "budget"),
        ("[[mount]]\nallow_other = true\n", "f.toml:1:", "mountpoint"),
        ("a = [", "f.toml:1:", "in `a`"),
    ];
    for (text, place, key) in cases {
        let error = Layer::parse(text, "f.toml").unwrap_err();
        let message = error.to_string();
        assert_eq!(error.exit_code(), 2);
        assert!(message.starts_with(place) && message.contains(key), "{message}");
    }
}

#[test]
fn variables_and_values_that_cannot_be_meant_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (name, value) in [
        ("REGISTRYFS_RETRIES", "-1"),
        ("REGISTRYFS_OFFLINE", "maybe"),
        ("REGISTRYFS_BUDGET", "1 parsec"),
        ("REGISTRYFS_CREDENTIAL", "nocolon"),
    ] {
        let environment = environment(dir.path(), &[("HOME", "/h"), (name, value)]);
        let error = Config::load(&environment, None, Layer::default()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
    let environment = environment(dir.path(), &[("HOME", "/h"), ("REGISTRYFS_ALLOW", "a.b,c/d")]);
    let error = Config::load(&environment, None, Layer::default()).unwrap_err();
    assert!(error.to_string().contains("c/d"), "{error}");
}

#[test]
fn conflicts_are_what_was_said_and_differs() {
    let dir = tempfile::tempdir().unwrap();
    let environment = environment(dir.path(), &[("HOME", "/h"), ("REGISTRYFS_RETRIES", "3")]);
    let loaded = Config::load(&environment, None, Layer::default()).unwrap();
    assert!(loaded.config.conflicts(&loaded.given).is_empty());
    let other = Layer {
        retries: Some(4),
        timeout_s: Some(60),
        insecure: Some(true),
        credential: Some("u:p".parse().unwrap()),
        platform: Some("linux/arm64".to_owned()),
        ..Layer::default()
    };
    assert_eq!(
        loaded.config.conflicts(&other),
        ["--retries", "--insecure", "--credential"]
    );
}

#[test]
fn a_credential_does_not_print() {
    let layer = Layer {
        credential: Some("user:hunter2".parse().unwrap()),
        ..Layer::default()
    };
    assert!(!format!("{layer:?}").contains("hunter2"));
    let error = "hunter2".parse::<Credential>().unwrap_err();
    assert!(!error.to_string().contains("hunter2"));
}

#[test]
fn what_is_brought_ahead_is_set_by_file_environment_and_mount() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("system.toml");
    let load = |text: &str, variables: &[(&str, &str)]| {
        fs::write(&file, text).unwrap();
        let variables = [&[("HOME", "/home/u")], variables].concat();
        Config::load(&environment(dir.path(), &variables), None, Layer::default())
    };
    let config = load("", &[]).unwrap().config;
    assert!(config.prefetch_landmarks);
    assert_eq!(
        (config.background, config.background_bytes_per_s),
        (BackgroundMode::Off, None)
    );
    let text = "prefetch_landmarks = false\nbackground = \"full\"\nbackground_bytes_per_s = \"20MB\"\n\
                [[mount]]\nmountpoint = \"/m\"\nbackground = \"idle\"\n";
    let config = load(text, &[]).unwrap().config;
    assert!(!config.prefetch_landmarks);
    assert_eq!(
        (config.background, config.background_bytes_per_s),
        (BackgroundMode::Full, Some(20_000_000))
    );
    assert_eq!(config.mounts[0].background, Some(BackgroundMode::Idle));
    let variables = [
        ("REGISTRYFS_PREFETCH_LANDMARKS", "1"),
        ("REGISTRYFS_BACKGROUND", "idle"),
        ("REGISTRYFS_BACKGROUND_BYTES_PER_S", "0"),
    ];
    let loaded = load(text, &variables).unwrap();
    assert!(loaded.config.prefetch_landmarks);
    assert_eq!(loaded.config.background, BackgroundMode::Idle);
    // What holds for a mount is no conflict with a daemon, and no rate is the rate 0.
    let running = load("", &[]).unwrap().config;
    assert_eq!(running.conflicts(&loaded.given), [""; 0]);
    let running = load(text, &[]).unwrap().config;
    assert_eq!(
        running.conflicts(&loaded.given),
        ["prefetch_landmarks", "background_bytes_per_s"]
    );
    for (name, value) in [
        ("REGISTRYFS_BACKGROUND", "on"),
        ("REGISTRYFS_BACKGROUND_BYTES_PER_S", "fast"),
    ] {
        let error = load("", &[(name, value)]).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}
