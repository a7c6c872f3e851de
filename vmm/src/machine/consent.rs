//! Whose word decides where an arriving guest leads: this host's operator names each file and interface, or lets the source do it.
//!
//! ```text
//!   the source's config ──► serial port, console, disks, TAPs, vsock ─┬─ told here ─────► the operator's place
//!                                                                     ├─ trust_source ──► the source's place
//!                                                                     └─ neither ───────► the move is refused, with all that is to be told
//!                       ──► kernel, initramfs ────────────────────────── neither ───────► the guest arrives, but is not booted again from
//!                                                                                         files that only the source has named
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use migration::{Refusal, RefusalKind};

use crate::config::{NetConfig, PayloadConfig, SerialConfig, SerialMode, VmConfig};
use crate::service::{ReceiveMigration, RestoreRequest};

/// Where the guest's devices lead at this host, and what it boots from.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) serial: Option<SerialConfig>,
    pub(super) console: Option<SerialConfig>,
    pub(super) vsock: Option<PathBuf>,
    pub(super) disks: BTreeMap<String, PathBuf>,
    pub(super) taps: BTreeMap<String, String>,
    pub(super) vhost: BTreeMap<String, PathBuf>,
    pub(super) kernel: Option<PathBuf>,
    pub(super) initramfs: Option<PathBuf>,
    pub(super) trust_source: bool,
}

impl From<ReceiveMigration> for Ends {
    fn from(request: ReceiveMigration) -> Self {
        Self {
            serial: request.serial,
            console: request.console,
            vsock: request.vsock,
            disks: request.disks,
            taps: request.taps,
            vhost: request.vhost,
            kernel: request.kernel,
            initramfs: request.initramfs,
            trust_source: request.trust_source,
        }
    }
}

impl From<RestoreRequest> for Ends {
    fn from(request: RestoreRequest) -> Self {
        Self {
            serial: request.serial,
            console: request.console,
            vsock: request.vsock,
            disks: request.disks,
            taps: request.taps,
            vhost: request.vhost,
            kernel: request.kernel,
            initramfs: request.initramfs,
            // Who names the snapshot is the operator of this host, as for a config.
            trust_source: true,
        }
    }
}

pub(super) fn refuse(kind: RefusalKind, detail: String) -> Refusal {
    Refusal { kind, detail }
}

/// A place that only the source has named.
fn untold(what: &str, option: &str) -> Refusal {
    let detail = format!(
        "{what} leads to a file, interface or terminal of the source's choice: say where it leads at the destination ({option}), or \
         that the source may say it (`--trust-source`)"
    );
    refuse(RefusalKind::Device, detail)
}

impl Ends {
    /// Puts this host's places into the config, or says which are to be told. Answers why the guest cannot be booted again, if it cannot.
    pub(super) fn apply(&self, config: &mut VmConfig) -> Result<Option<String>, Vec<Refusal>> {
        let mut refused = Vec::new();
        let ports = [
            (
                "serial",
                "the serial port",
                &mut config.serial,
                &self.serial,
            ),
            ("console", "the console", &mut config.console, &self.console),
        ];
        for (option, what, end, wanted) in ports {
            refused.extend(self.port(option, what, end, wanted.as_ref()).err());
        }
        refused.extend(self.back_ends(config));
        for disk in config.disks.iter_mut().filter(|disk| !disk.vhost_user) {
            let id = disk.id.clone().unwrap_or_default();
            match self.disks.get(&id) {
                Some(path) => disk.path.clone_from(path),
                None if self.trust_source => {}
                None => refused.push(untold(
                    &format!("disk {id}"),
                    "`vmm receive --disk ID=PATH`",
                )),
            }
        }
        for net in config.net.iter_mut().filter(|net| !net.vhost_user) {
            refused.extend(self.net(net).err());
        }
        if let Some(vsock) = &mut config.vsock {
            match &self.vsock {
                Some(path) => vsock.socket.clone_from(path),
                None if self.trust_source => {}
                None => refused.push(untold("vsock", "`vmm receive --vsock PATH`")),
            }
        }
        if config.rng.src != crate::config::urandom() && !self.trust_source {
            refused.push(untold(
                "the source of random numbers",
                "there is no option for it",
            ));
        }
        refused.extend(self.readable());
        let untold_boot = self.payload(&mut config.payload);
        match refused.is_empty() {
            true => Ok(untold_boot),
            false => Err(refused),
        }
    }

    fn port(
        &self,
        option: &str,
        what: &str,
        end: &mut SerialConfig,
        wanted: Option<&SerialConfig>,
    ) -> Result<(), Refusal> {
        match wanted {
            // A device cannot come or go with a move, as a serial port can.
            Some(wanted)
                if option == "console"
                    && (wanted.mode == SerialMode::Off) != (end.mode == SerialMode::Off) =>
            {
                let detail =
                    "the guest has a console where none is wanted here, or the other way round";
                return Err(refuse(RefusalKind::Device, detail.to_owned()));
            }
            Some(wanted) => end.clone_from(wanted),
            // A new pseudo terminal is nobody's; the terminal of this process is its operator's.
            None if matches!(
                end.mode,
                SerialMode::File | SerialMode::Socket | SerialMode::Tty
            ) && !self.trust_source =>
            {
                let option = format!("`vmm receive --{option} WHERE`");
                return Err(untold(what, &option));
            }
            None => {}
        }
        Ok(())
    }

    /// The sockets of vhost-user back ends.
    fn back_ends(&self, config: &mut VmConfig) -> Vec<Refusal> {
        let mut refused = Vec::new();
        let disks = config.disks.iter_mut().filter(|disk| disk.vhost_user);
        let disks = disks.map(|disk| (&disk.id, &mut disk.vhost_socket));
        let nets = config.net.iter_mut().filter(|net| net.vhost_user);
        let nets = nets.map(|net| (&net.id, &mut net.vhost_socket));
        for (id, socket) in disks.chain(nets) {
            let id = id.clone().unwrap_or_default();
            match self.vhost.get(&id) {
                Some(path) => *socket = Some(path.clone()),
                None if self.trust_source => {}
                None => refused.push(untold(
                    &format!("the vhost-user back end of {id}"),
                    "`vmm receive --vhost ID=SOCKET`",
                )),
            }
        }
        // No source of this build sends one.
        for fs in &config.fs {
            let detail = format!("the file system {} cannot go with its guest", fs.tag);
            refused.push(refuse(RefusalKind::Device, detail));
        }
        refused
    }

    fn net(&self, net: &mut NetConfig) -> Result<(), Refusal> {
        let id = net.id.clone().unwrap_or_default();
        match self.taps.get(&id) {
            // Its addresses are this host's: who chooses them can draw the host's traffic to the guest.
            Some(_)
                if !self.trust_source
                    && (net.ip.is_some() || net.mask.is_some() || net.host_mac.is_some()) =>
            {
                let detail = format!(
                    "network interface {id} gives addresses to the host's end: say that the source may do so (`--trust-source`), or \
                     leave `ip`, `mask` and `host_mac` out of its config and set the interface up at each host"
                );
                return Err(refuse(RefusalKind::Device, detail));
            }
            Some(tap) => match tap.strip_prefix("fd:") {
                None => (net.tap, net.fds) = (Some(tap.clone()), None),
                Some(numbers) => {
                    let numbers: Result<Vec<i32>, _> = numbers.split(',').map(str::parse).collect();
                    let Ok(numbers) = numbers else {
                        let detail = format!(
                            "network interface {id}: `{tap}` are no descriptors: write fd:N, or fd:N,M for two pairs of queues"
                        );
                        return Err(refuse(RefusalKind::Config, detail));
                    };
                    net.fds = Some(numbers);
                    // An interface that is passed is set up already.
                    (net.tap, net.ip, net.mask, net.host_mac) = (None, None, None, None);
                }
            },
            // Its numbers say nothing here, whoever is trusted.
            None if net.fds.is_some() => {
                let detail = format!(
                    "network interface {id} is on descriptors that were passed at the source: say what it is on at the destination \
                     (`vmm receive --tap ID=NAME` or `--tap ID=fd:N`)"
                );
                return Err(refuse(RefusalKind::Device, detail));
            }
            None if self.trust_source => {}
            // A new interface without a name harms nobody.
            None if net.tap.is_none() && net.ip.is_none() => {}
            None => {
                return Err(untold(
                    &format!("network interface {id}"),
                    "`vmm receive --tap ID=NAME`",
                ));
            }
        }
        Ok(())
    }

    /// Files that the operator has named and that are not there: better found now than when the guest resets itself.
    fn readable(&self) -> Vec<Refusal> {
        let named = [("kernel", &self.kernel), ("initramfs", &self.initramfs)];
        let named = named
            .into_iter()
            .filter_map(|(what, path)| Some((what, path.as_deref()?)));
        let problem = |(what, path): (&str, &Path)| {
            let error = std::fs::File::open(path).err()?;
            let detail = format!("payload.{what}: cannot open {}: {error}", path.display());
            Some(refuse(RefusalKind::Config, detail))
        };
        named.filter_map(problem).collect()
    }

    /// A guest that resets itself is booted again from these: the reason why it is not, if they are the source's choice.
    fn payload(&self, payload: &mut PayloadConfig) -> Option<String> {
        let mut untold = Vec::new();
        // Who trusts the source trusts what its operator has named.
        let trusted = self.trust_source && !payload.untold;
        let parts = [
            ("kernel", &mut payload.kernel, &self.kernel),
            ("initramfs", &mut payload.initramfs, &self.initramfs),
        ];
        for (what, place, told) in parts {
            match told {
                Some(path) => *place = Some(path.clone()),
                None if trusted || place.is_none() => {}
                None => untold.push(what),
            }
        }
        payload.untold = !untold.is_empty();
        if untold.is_empty() {
            return None;
        }
        Some(format!(
            "only the host that it came from has named its {}; name it here with vm.payload (`vmm ctl payload`), or for the next one with \
             `vmm receive --kernel PATH --initramfs PATH` or `--trust-source`",
            untold.join(" and ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_chooses_no_addresses_of_this_host() {
        for (keys, taken) in [
            ("", true),
            (r#", "mtu": 1400"#, true),
            (r#", "ip": "8.8.8.8", "mask": "128.0.0.0""#, false),
            (r#", "host_mac": "52:54:00:12:34:56""#, false),
        ] {
            let json = format!(
                r#"{{"payload": {{"kernel": "k"}}, "net": [{{"id": "nic", "tap": "theirs"{keys}}}]}}"#
            );
            let mut config = VmConfig::from_peer(json.as_bytes()).expect("a config");
            let mut ends = Ends::default();
            assert!(
                ends.apply(&mut config).is_err(),
                "no word of where it leads"
            );
            ends.taps.insert("nic".to_owned(), "tap0".to_owned());
            assert_eq!(ends.apply(&mut config).is_ok(), taken, "{keys}");
            ends.trust_source = true;
            ends.apply(&mut config).expect("trusted");
            assert_eq!(config.net[0].tap.as_deref(), Some("tap0"));
        }
    }

    #[test]
    fn descriptors_of_another_host_say_nothing_here() {
        let config =
            r#"{"payload": {"kernel": "k"}, "net": [{"id": "n", "fds": [7, 8], "num_queues": 4}]}"#;
        let mut ends = Ends {
            trust_source: true,
            ..Ends::default()
        };
        let refused = ends.apply(&mut arriving(config)).expect_err("its numbers");
        assert!(refused[0].detail.contains("fd:N"), "{refused:?}");
        for (told, tap, fds) in [
            ("tap3", Some("tap3"), None),
            ("fd:5,6", None, Some(vec![5, 6])),
        ] {
            ends.taps.insert("n".to_owned(), told.to_owned());
            let mut there = arriving(config);
            ends.apply(&mut there).expect("told");
            let net = &there.net[0];
            assert_eq!((net.tap.as_deref(), &net.fds), (tap, &fds));
        }
        ends.taps.insert("n".to_owned(), "fd:x".to_owned());
        let refused = ends.apply(&mut arriving(config)).expect_err("no numbers");
        assert!(refused[0].detail.contains("fd:x"), "{refused:?}");
    }

    fn arriving(json: &str) -> VmConfig {
        VmConfig::from_peer(json.as_bytes()).expect("a config")
    }

    #[test]
    fn a_source_takes_no_terminal_of_this_host() {
        let config = r#"{"payload": {"kernel": "k"}, "serial": {"mode": "Tty"}, "console": {"mode": "Null"}}"#;
        let refused = Ends::default()
            .apply(&mut arriving(config))
            .expect_err("nobody here has said so");
        assert!(refused[0].detail.contains("--serial"), "{refused:?}");
        let other = config
            .replace("Tty", "X")
            .replace("Null", "Tty")
            .replace("X", "Null");
        let refused = Ends::default()
            .apply(&mut arriving(&other))
            .expect_err("nobody here has said so");
        assert!(refused[0].detail.contains("--console"), "{refused:?}");
        let told = Ends {
            serial: Some("tty".parse().expect("a port")),
            ..Ends::default()
        };
        told.apply(&mut arriving(config)).expect("told");
        for harmless in ["Off", "Null", "Pty"] {
            let config = config.replace("Tty", harmless);
            Ends::default()
                .apply(&mut arriving(&config))
                .expect("nobody's");
        }
    }

    #[test]
    fn all_that_is_to_be_told_is_said_at_once() {
        let config = r#"{"payload": {"kernel": "k"}, "disks": [{"path": "d", "id": "d"}], "net": [{"id": "n", "tap": "t"}],
            "vsock": {"cid": 3, "socket": "s"}, "serial": {"mode": "File", "file": "f"}}"#;
        let refused = Ends::default()
            .apply(&mut arriving(config))
            .expect_err("four places");
        assert_eq!(refused.len(), 4, "{refused:?}");
    }

    #[test]
    fn a_guest_boots_again_only_from_files_that_were_named_here() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let here = || Some(file.path().to_owned());
        let config = r#"{"payload": {"kernel": "k", "initramfs": "i"}}"#;
        let (mut ends, mut there) = (Ends::default(), arriving(config));
        let why = ends.apply(&mut there).expect("it arrives").expect("untold");
        assert!(why.contains("kernel and initramfs"), "{why}");
        assert!(there.payload.untold);
        let trusting = Ends {
            trust_source: true,
            ..Ends::default()
        };
        let mut further = there.clone();
        let why = trusting.apply(&mut further).expect("it arrives");
        assert!(
            why.is_some(),
            "trust in the host before does not make them told"
        );
        let saved = serde_json::to_vec(&there).expect("JSON");
        assert_eq!(VmConfig::from_peer(&saved).expect("a config"), there);
        ends.kernel = here();
        let why = ends.apply(&mut there).expect("it arrives").expect("untold");
        assert!(why.contains("its initramfs;"), "{why}");
        ends.initramfs = here();
        assert_eq!(ends.apply(&mut there), Ok(None));
        assert!(!there.payload.untold);
        assert_eq!(
            (there.payload.kernel, there.payload.initramfs),
            (here(), here())
        );
        assert_eq!(trusting.apply(&mut arriving(config)), Ok(None));
        ends.kernel = Some("/does/not/exist".into());
        let refused = ends.apply(&mut arriving(config)).expect_err("no such file");
        assert!(refused[0].detail.contains("/does/not/exist"), "{refused:?}");
    }
}
