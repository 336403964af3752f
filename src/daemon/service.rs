//! What a service manager sees of a daemon: when it is ready, how it is doing, and that it is alive.
//!
//! Ready means that every configured mount answers. The network is not waited for: a mount that needs a registry which
//! does not answer is tried again and again behind the daemon's back, and the status says so. Everything else that makes
//! a configured mount fail is a mistake, and ends the start.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::mounts::Mounts;
use super::protocol::{MountRequest, Outcome};
use super::server::Server;
use crate::error::{Error, Result};

/// How long the readiness waits for mounts that neither answer nor have failed, because they wait for a registry.
const PATIENCE: Duration = Duration::from_secs(2);
/// The pause before a mount that failed on the network is tried again; it doubles from the first to the last.
const RETRY_PAUSE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30);
/// How often within the watchdog's time the mounts are looked at: one lost look must not end the daemon.
const LOOKS: u32 = 3;
/// How many mounts a status line names that wait.
const NAMED_MAX: usize = 3;

/// The configured mounts on their way: those that do not answer yet, with the reason once there is one.
type Missing = BTreeMap<PathBuf, Option<Error>>;

/// The attempts at configured mounts; dropping it ends those that are still made.
pub(super) struct Attempts {
    _tasks: JoinSet<()>,
    missing: watch::Sender<Missing>,
}

impl Attempts {
    /// Begins to mount everything at once.
    pub(super) fn start(server: &Arc<Server>, requests: Vec<MountRequest>) -> Self {
        let names = requests.iter().map(|request| (request.mountpoint.clone(), None));
        let missing = watch::Sender::new(names.collect());
        let mut tasks = JoinSet::new();
        for request in requests {
            tasks.spawn(mount_in_the_end(server.clone(), request, missing.clone()));
        }
        Self {
            _tasks: tasks,
            missing,
        }
    }

    /// Waits until every mount answers or has failed on the network once, at most for [`PATIENCE`].
    ///
    /// # Errors
    /// Why one of them cannot be mounted at all.
    pub(super) async fn settle(&self) -> Result<()> {
        let mistake = |missing: &Missing| {
            missing
                .values()
                .flatten()
                .find(|error| !error.is_network())
                .cloned()
        };
        let mut missing = self.missing.subscribe();
        let settled = missing.wait_for(|now| now.values().all(Option::is_some) || mistake(now).is_some());
        // Either way what counts is how it stands now.
        let _ = timeout(PATIENCE, settled).await;
        mistake(&self.missing.borrow()).map_or(Ok(()), Err)
    }

    /// Tells the service manager how the daemon is doing, for as long as this is polled: a line of status with every
    /// change, and a sign of life while the mounts answer.
    pub(super) async fn report(&self, mounts: &Arc<Mounts>) {
        tokio::join!(self.report_status(mounts), prove_life(mounts));
    }

    async fn report_status(&self, mounts: &Mounts) {
        let (mut missing, mut changes) = (self.missing.subscribe(), mounts.changes());
        loop {
            let line = status_line(mounts.count(), &missing.borrow_and_update());
            tell(&[NotifyState::Status(&line)]);
            let changed = tokio::select! {
                changed = missing.changed() => changed,
                changed = changes.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }
}

/// Mounts, again and again until it answers: also after a mistake, because once the daemon is up a registry's change of
/// mind is no reason to give up what was configured.
async fn mount_in_the_end(server: Arc<Server>, request: MountRequest, missing: watch::Sender<Missing>) {
    let mountpoint = &request.mountpoint;
    let mut pause = *RETRY_PAUSE.start();
    loop {
        let error = match server.mount(request.clone()).await {
            Ok(Outcome::Done) => break,
            Ok(Outcome::Failed(error)) | Err(error) => error,
            Ok(Outcome::Ending) => return,
        };
        tracing::warn!(mountpoint = %mountpoint.display(), %error, "not mounted yet");
        missing.send_modify(|missing| {
            missing.insert(mountpoint.clone(), Some(error));
        });
        sleep(pause).await;
        pause = (pause * 2).min(*RETRY_PAUSE.end());
    }
    missing.send_modify(|missing| {
        missing.remove(mountpoint);
    });
}

/// Feeds the watchdog, where there is one, after each look that found all mounts answering. What they answer needs no
/// network, so a registry that is down does not end the daemon.
async fn prove_life(mounts: &Mounts) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut ticks = interval((limit / LOOKS).max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match mounts.see_they_answer().await {
            Ok(()) => tell(&[NotifyState::Watchdog]),
            Err(error) => tracing::error!(%error, "the self-check failed"),
        }
    }
}

/// What `systemctl status` shows.
fn status_line(mounted: usize, missing: &Missing) -> String {
    let mut line = match mounted {
        1 => "1 mount answers".to_owned(),
        count => format!("{count} mounts answer"),
    };
    let waits = |(path, error): (&PathBuf, &Option<Error>)| match error {
        Some(error) => format!("{} ({error})", path.display()),
        None => path.display().to_string(),
    };
    let names: Vec<String> = missing.iter().take(NAMED_MAX).map(waits).collect();
    if !names.is_empty() {
        line.push_str("; waiting for a registry: ");
        line.push_str(&names.join(", "));
    }
    if missing.len() > names.len() {
        line.push_str(&format!(" and {} more", missing.len() - names.len()));
    }
    // A line break would begin another message.
    line.replace(char::is_control, " ")
}

/// Tells systemd, where it started this process.
pub(super) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager does not hear");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_line_and_names_what_is_missing() {
        assert_eq!(status_line(1, &Missing::new()), "1 mount answers");
        let error = Error::network("a.example", "refused\nREADY=1");
        let missing = Missing::from([("/a".into(), Some(error)), ("/b".into(), None)]);
        let line = status_line(0, &missing);
        assert!(
            line.starts_with("0 mounts answer; waiting for a registry: /a (a.example"),
            "{line}"
        );
        assert!(line.ends_with("), /b") && !line.contains('\n'), "{line}");
        let many: Missing = (0..9).map(|i| (PathBuf::from(format!("/{i}")), None)).collect();
        assert!(status_line(2, &many).ends_with("/2 and 6 more"));
    }
}
