//! Mounts and the daemon behind them.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use registryfs::demo::{Account, Auth};
use registryfs::store::lock::Lock;

use crate::world::{World, code, errors, finish, is_mounted, start, until};

fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap())
}

fn status(world: &World) -> serde_json::Value {
    serde_json::from_str(&world.text(&["status", "--format", "json"])).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn mounts_that_race_share_one_daemon_which_ends_with_the_last() {
    let world = World::new();
    let mountpoints: Vec<_> = (0..4).map(|i| world.mountpoint(&format!("m{i}"))).collect();
    let children: Vec<_> = mountpoints
        .iter()
        .map(|mountpoint| start(&mut world.command(&["mount", text(mountpoint)])))
        .collect();
    for output in children.into_iter().map(finish) {
        assert_eq!(code(&output), 0, "{}", errors(&output));
    }
    assert!(mountpoints.iter().all(|path| is_mounted(path)));
    assert_eq!(status(&world)["mounts"].as_array().unwrap().len(), 4);
    let daemon = world.holder().unwrap().pid;
    assert_eq!(status(&world)["daemon"]["pid"], daemon);

    let (last, others) = mountpoints.split_last().unwrap();
    for mountpoint in others {
        world.text(&["umount", text(mountpoint)]);
        assert!(!is_mounted(mountpoint));
    }
    assert_eq!(world.holder().unwrap().pid, daemon, "it lives for its last mount");
    world.text(&["umount", text(last)]);
    Lock::take(&world.store()).expect("the lock is free as soon as umount returns");
    assert!(!is_mounted(last));
}

#[test]
fn an_unmount_from_outside_ends_the_daemon_too() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    nix::mount::umount(&mountpoint).unwrap();
    until("the lock is free", || Lock::take(&world.store()).is_ok());
    assert!(world.log().contains("ended"), "{}", world.log());
}

#[test]
fn a_copy_of_a_mount_is_served_until_it_is_gone() {
    let world = World::new();
    let (mountpoint, copy) = (world.mountpoint("m"), world.mountpoint("copy"));
    world.text(&["mount", text(&mountpoint)]);
    let none = None::<&str>;
    nix::mount::mount(Some(&mountpoint), &copy, none, nix::mount::MsFlags::MS_BIND, none).unwrap();
    world.text(&["umount", text(&mountpoint)]);
    assert!(!is_mounted(&mountpoint));
    assert!(std::fs::read_to_string(copy.join(".registryfs/version")).is_ok());
    world.text(&["mount", text(&mountpoint)]);
    world.text(&["umount", text(&mountpoint)]);
    nix::mount::umount(&copy).unwrap();
    until("the lock is free", || Lock::take(&world.store()).is_ok());
}

#[test]
fn a_daemon_answers_as_the_command_itself_does() {
    let world = World::new();
    let image = world.image("base/slim:11");
    let questions: Vec<Vec<&str>> = vec![
        vec!["digest", &image],
        vec!["manifest", &image],
        vec!["config", &image],
        vec!["ls", &image, "/usr"],
        vec!["cat", &image, "/etc/os-release"],
        vec!["info", &image, "/etc/motd"],
        vec!["cat", &image, "/nope"],
    ];
    // The first answer fills the cache, whose size the answers show.
    world.text(&["cat", &image, "/etc/motd"]);
    world.text(&["cat", &image, "/etc/os-release"]);
    let ask = |question: &Vec<&str>| {
        let output = world.run(question);
        (code(&output), errors(&output), output.stdout)
    };
    let alone: Vec<_> = questions.iter().map(ask).collect();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let asked: Vec<_> = questions.iter().map(ask).collect();
    assert_eq!(alone, asked);
    let cache = &status(&world)["cache"];
    assert_eq!(cache["layers"], 1);
    assert!(cache["disk_bytes"].as_u64().unwrap() > 0, "{cache}");
}

#[test]
fn settings_that_the_daemon_does_not_have_are_refused_by_name() {
    let world = World::new();
    let (first, second) = (world.mountpoint("a"), world.mountpoint("b"));
    world.text(&["mount", "--retries", "3", text(&first)]);
    let refused = world.run(&["mount", "--retries", "4", "--insecure", text(&second)]);
    let message = errors(&refused);
    assert_eq!(code(&refused), 1);
    assert!(message.contains("--retries, --insecure"), "{message}");
    assert!(!is_mounted(&second));
    // The platform is each mount's own.
    world.text(&[
        "mount",
        "--retries",
        "3",
        "--platform",
        "linux/arm64",
        text(&second),
    ]);
    let again = world.run(&["mount", text(&second)]);
    assert_eq!(code(&again), 1, "{}", errors(&again));
}

#[test]
fn a_failed_mount_leaves_no_daemon() {
    let world = World::new();
    let file = world.file("file", "");
    let output = world.run(&["mount", text(&file)]);
    assert_ne!(code(&output), 0);
    assert!(errors(&output).contains("file"), "{}", errors(&output));
    until("the lock is free", || Lock::take(&world.store()).is_ok());
}

#[test]
fn a_mount_inside_a_mount_is_refused() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let link = world.store().with_extension("link");
    std::os::unix::fs::symlink(&mountpoint, &link).unwrap();
    for place in [mountpoint.join("localhost:5000"), link.join("localhost:5000")] {
        let refused = world.run(&["mount", text(&place)]);
        let message = errors(&refused);
        assert_eq!(code(&refused), 2, "{message}");
        assert!(
            message.contains("inside the registryfs at") && message.contains(text(&mountpoint)),
            "{message}"
        );
    }
    world.text(&["umount", text(&mountpoint)]);
}

#[test]
fn a_busy_mount_stays_and_its_user_is_named() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let mut user = Command::new("sleep")
        .arg("60")
        .current_dir(&mountpoint)
        .spawn()
        .unwrap();
    let refused = world.run(&["umount", text(&mountpoint)]);
    user.kill().unwrap();
    user.wait().unwrap();
    assert_eq!(code(&refused), 1);
    assert!(
        errors(&refused).contains(&user.id().to_string()),
        "{}",
        errors(&refused)
    );
    assert!(is_mounted(&mountpoint));
    world.text(&["umount", text(&mountpoint)]);
}

#[test]
fn a_killed_daemon_is_replaced_and_its_dead_mount_too() {
    let world = World::new();
    let (mountpoint, other) = (world.mountpoint("m"), world.mountpoint("n"));
    world.text(&["mount", text(&mountpoint)]);
    world.text(&["mount", text(&other)]);
    kill(pid(world.holder().unwrap().pid), Signal::SIGKILL).unwrap();
    until("the daemon is gone", || Lock::take(&world.store()).is_ok());
    assert!(is_mounted(&mountpoint) && is_mounted(&other), "dead mounts stay");
    world.text(&["mount", text(&mountpoint)]);
    assert!(std::fs::read_dir(&mountpoint).is_ok_and(|mut entries| entries.all(|entry| entry.is_ok())));
    // The dead mount of the other one, which no daemon knows any more.
    world.text(&["umount", text(&other)]);
    assert!(!is_mounted(&other));
}

#[test]
fn the_password_is_neither_in_an_argument_nor_in_the_log() {
    let world = World::new();
    let account = Account::new("user", "hunter2");
    world
        .registry
        .handle()
        .update(|behaviour| behaviour.auth = Auth::Basic(account));
    let mountpoint = world.mountpoint("m");
    let allow = format!("allow={}", world.registry.host());
    let mut mount = world.command(&["--debug", "mount", "-o", &allow, text(&mountpoint)]);
    mount.env("REGISTRYFS_CREDENTIAL", "user:hunter2");
    let output = finish(start(&mut mount));
    assert_eq!(code(&output), 0, "{}", errors(&output));
    // The daemon has it all the same.
    let image = world.image("base/slim:11");
    world.text(&["ls", &image]);
    let daemon = world.holder().unwrap().pid;
    let arguments = std::fs::read_to_string(format!("/proc/{daemon}/cmdline")).unwrap();
    for place in [
        arguments,
        world.log(),
        errors(&output),
        status(&world).to_string(),
    ] {
        assert!(!place.contains("hunter2"), "{place}");
    }
    assert!(!world.log().is_empty());
}

#[test]
fn a_foreground_daemon_tells_systemd_and_ends_in_order_on_sigterm() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    let config = format!("[[mount]]\nmountpoint = {:?}\n", text(&mountpoint));
    let config = world.file("c.toml", &config);
    let notify = world.store().with_extension("notify");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(crate::world::LIMIT)).unwrap();
    let mut command = world.command(&["daemon", "--config", text(&config)]);
    let daemon = start(command.env("NOTIFY_SOCKET", &notify));
    assert_eq!(hear(&socket), "READY=1");
    assert!(is_mounted(&mountpoint), "ready means mounted");
    assert_eq!(hear(&socket), "STATUS=1 mount answers");

    // It takes further mounts on, and stays when they are gone.
    let second = world.mountpoint("n");
    world.text(&["mount", text(&second)]);
    world.text(&["umount", text(&second)]);
    world.text(&["umount", text(&mountpoint)]);
    assert!(world.holder().unwrap().socket.is_some());
    world.text(&["mount", text(&second)]);

    until("the status says so", || hear(&socket) == "STATUS=1 mount answers");

    kill(pid(daemon.id()), Signal::SIGTERM).unwrap();
    let output = finish(daemon);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    until("it says that it ends", || hear(&socket) == "STOPPING=1");
    assert!(!is_mounted(&second));
    Lock::take(&world.store()).unwrap();
}

/// The next word to the service manager.
fn hear(socket: &UnixDatagram) -> String {
    let mut message = [0; 4096];
    let length = socket.recv(&mut message).unwrap();
    String::from_utf8_lossy(&message[..length]).trim_end().to_owned()
}

#[test]
fn the_watchdog_is_fed_while_the_mounts_answer_whatever_the_registry_does() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    let config = world.file(
        "c.toml",
        &format!("[[mount]]\nmountpoint = {:?}\n", text(&mountpoint)),
    );
    let notify = world.store().with_extension("notify");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(crate::world::LIMIT)).unwrap();
    world.registry.handle().stop();
    let mut command = world.command(&["daemon", "--config", text(&config)]);
    command
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "150000");
    let daemon = start(&mut command);
    let sign_of_life = || hear(&socket) == "WATCHDOG=1";
    until("it shows a sign of life", sign_of_life);
    assert!(std::fs::metadata(mountpoint.join(world.image("base/slim:11"))).is_err());
    until("it goes on", sign_of_life);

    kill(pid(daemon.id()), Signal::SIGTERM).unwrap();
    // Unread words would fill the socket, and a daemon waits until it is heard.
    until("it says that it ends", || hear(&socket) == "STOPPING=1");
    assert_eq!(code(&finish(daemon)), 0);
}

#[test]
fn an_image_whose_registry_is_away_is_mounted_when_it_comes_back() {
    let world = World::new();
    let (all, image) = (world.mountpoint("all"), world.mountpoint("image"));
    let reference = world.image("base/slim:11");
    let config = format!(
        "retries = 0\n[[mount]]\nmountpoint = {:?}\n[[mount]]\nmountpoint = {:?}\nsource = {reference:?}\n",
        text(&all),
        text(&image)
    );
    let config = world.file("c.toml", &config);
    let notify = world.store().with_extension("notify");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(crate::world::LIMIT)).unwrap();
    world.registry.handle().stop();
    let mut command = world.command(&["daemon", "--config", text(&config)]);
    let daemon = start(command.env("NOTIFY_SOCKET", &notify));
    assert_eq!(hear(&socket), "READY=1", "the network is not waited for");
    assert!(is_mounted(&all) && !is_mounted(&image));
    let status = hear(&socket);
    assert!(status.starts_with("STATUS=1 mount answers; waiting"), "{status}");
    assert!(status.contains(text(&image)), "{status}");
    world.registry.handle().restart().unwrap();
    until("the status says so", || hear(&socket) == "STATUS=2 mounts answer");
    assert!(image.join("etc/os-release").exists());
    kill(pid(daemon.id()), Signal::SIGTERM).unwrap();
    until("it says that it ends", || hear(&socket) == "STOPPING=1");
    assert_eq!(code(&finish(daemon)), 0);
}

#[test]
fn a_daemon_without_mounts_says_what_it_waits_for() {
    let world = World::new();
    let daemon = start(&mut world.command(&["daemon"]));
    until("it listens", || {
        world.holder().is_some_and(|holder| holder.socket.is_some())
    });
    kill(pid(daemon.id()), Signal::SIGTERM).unwrap();
    let output = finish(daemon);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    assert!(errors(&output).contains("[[mount]]"), "{}", errors(&output));
}

#[test]
fn the_status_tells_where_what_failed_and_why() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let missing = world.image("base/slim:nope");
    assert!(std::fs::metadata(mountpoint.join(&missing)).is_err());
    let status = world.text(&["status"]);
    let host = registryfs::image::platform::Platform::host().to_string();
    let platform = status.lines().find(|line| line.contains("platform:")).unwrap();
    assert!(platform.ends_with(&host), "{status}");
    let failure = format!("Z lookup {missing}: ENOENT: ");
    assert!(status.contains(&failure), "{status}");
    world.text(&["umount", text(&mountpoint)]);
}

#[test]
fn sigterm_does_not_wait_for_those_who_use_the_mount() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let mut user = Command::new("sleep")
        .arg("600")
        .current_dir(&mountpoint)
        .spawn()
        .unwrap();
    kill(pid(world.holder().unwrap().pid), Signal::SIGTERM).unwrap();
    until("the lock is free", || Lock::take(&world.store()).is_ok());
    let still_there = user.try_wait().unwrap().is_none();
    user.kill().unwrap();
    user.wait().unwrap();
    assert!(still_there && !is_mounted(&mountpoint));
}

#[test]
fn each_mount_has_its_own_registries() {
    let world = World::new();
    let (open, closed) = (world.mountpoint("open"), world.mountpoint("closed"));
    world.text(&["mount", text(&open)]);
    world.text(&["mount", "-o", "allow=*.example.org", text(&closed)]);
    let tags = |mountpoint: &Path| std::fs::read_dir(mountpoint.join(world.image("base/slim"))).is_ok();
    assert!(tags(&open));
    assert!(!tags(&closed));
}

#[test]
fn a_foreground_mount_ends_with_its_mount() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    let mount = start(&mut world.command(&["mount", "-f", text(&mountpoint)]));
    until("it is mounted", || is_mounted(&mountpoint));
    until("it is known", || {
        status(&world)["mounts"].as_array().is_some_and(|m| m.len() == 1)
    });
    // A second one goes through the first one's daemon, and ends at Ctrl-C without it.
    let other = world.mountpoint("n");
    let guest = start(&mut world.command(&["mount", "-f", text(&other)]));
    until("both are known", || {
        status(&world)["mounts"].as_array().is_some_and(|m| m.len() == 2)
    });
    kill(pid(guest.id()), Signal::SIGINT).unwrap();
    assert_eq!(code(&finish(guest)), 0);
    assert!(!is_mounted(&other) && is_mounted(&mountpoint));
    world.text(&["umount", text(&mountpoint)]);
    assert_eq!(code(&finish(mount)), 0);
}

#[test]
fn a_daemon_may_open_as_many_files_as_the_system_lets_it() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    let mount = world.command(&["mount", text(&mountpoint)]);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -Sn 64 && exec \"$@\"", "sh"])
        .arg(mount.get_program())
        .args(mount.get_args())
        .env_clear()
        .envs(mount.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = finish(start(&mut limited));
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let daemon = world.holder().unwrap().pid;
    let limits = std::fs::read_to_string(format!("/proc/{daemon}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let numbers: Vec<_> = line.split_whitespace().skip(3).take(2).collect();
    assert!(numbers[0] == numbers[1] && numbers[0] != "64", "{line}");
}

#[test]
fn nonsense_on_the_control_socket_harms_nobody() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let socket = world.holder().unwrap().socket.unwrap();
    for nonsense in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0xff, 0xff, 0xff, 0xff],
        &[0, 0, 0, 0, 2, b'{', b'}'],
        &[1, 0, 0, 0, 1, 0],
        &[],
    ] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(nonsense).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // It answers with an error or just hangs up, and does either soon.
        stream.set_read_timeout(Some(crate::world::LIMIT)).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // Clients that say nothing at all do not keep others from being served.
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert_eq!(status(&world)["mounts"].as_array().unwrap().len(), 1);
    drop(silent);
}

#[test]
fn clients_that_take_their_time_keep_nobody_from_control() {
    let large = crate::copies::noise(24 << 20, 1);
    let world = World::of(crate::copies::content(&[&[crate::support::file("large", large)]]));
    let image = world.image(crate::copies::IMAGE);
    world.text(&["prefetch", &image]);
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    // More than are served at once, and nobody reads what they print.
    let stalled: Vec<_> = (0..80)
        .map(|_| start(&mut world.command(&["cat", &image, "large"])))
        .collect();
    let socket = world.holder().unwrap().socket.unwrap();
    let connected = || {
        let table = std::fs::read_to_string("/proc/net/unix").unwrap();
        table.lines().filter(|line| line.ends_with(text(&socket))).count()
    };
    until("all are there", || connected() > stalled.len());
    assert_eq!(status(&world)["mounts"].as_array().unwrap().len(), 1);
    world.text(&["umount", text(&mountpoint)]);
    for mut client in stalled {
        client.kill().unwrap();
        client.wait().unwrap();
    }
}
