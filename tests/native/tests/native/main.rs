//! The native suite: real guests on this machine, each test on every back end.

mod boot;
mod devices;
mod disks;
mod failures;
mod matrix;
mod moves;
mod refusals;
mod snapshots;
mod vcpus;
mod vhost;

use libtest_mimic::{Arguments, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(boot::trials());
    trials.extend(moves::trials());
    trials.extend(disks::trials());
    trials.extend(failures::trials());
    trials.extend(refusals::trials());
    trials.extend(devices::trials());
    trials.extend(snapshots::trials());
    trials.extend(vcpus::trials());
    trials.extend(vhost::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
