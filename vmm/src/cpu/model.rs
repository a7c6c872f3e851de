//! Models by name and by file.

use std::path::Path;

use arch::x86_64::cpu_model::{CpuModel, ModelError, ModelSpec};
use arch::x86_64::cpuid::{Cpuid, Interface, can_be_portable, of_interface};
use hypervisor::Hypervisor;

use crate::config::{ConfigError, CpusConfig};

/// A model that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The file cannot be read, or is no model.
    #[error("{0}")]
    File(String),
    /// The model contradicts itself, or names what does not exist.
    #[error("{}", list(.0))]
    Model(Vec<ModelError>),
}

/// Several sentences as one.
pub(crate) fn list<T: std::fmt::Display>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join("; ")
}

/// Whether a name stands for a file.
fn is_path(name: &str) -> bool {
    name.contains('/') || Path::new(name).extension().is_some_and(|e| e == "json")
}

/// The model of this name, or of the file at this path.
pub(crate) fn load(name: &str) -> Result<CpuModel, LoadError> {
    if !is_path(name) {
        return CpuModel::builtin(name).map_err(|error| LoadError::Model(vec![error]));
    }
    let json = crate::json::read_file(Path::new(name)).map_err(LoadError::File)?;
    let spec: ModelSpec =
        crate::json::parse(&json).map_err(|error| LoadError::File(format!("{name}: {error}")))?;
    CpuModel::from_spec(&spec).map_err(LoadError::Model)
}

fn field(field: &'static str, problem: String, fix: &str) -> ConfigError {
    ConfigError::Field {
        field,
        problem,
        fix: fix.to_owned(),
    }
}

/// The model that a config asks for.
pub(crate) fn resolve(cpus: &CpusConfig) -> Result<CpuModel, ConfigError> {
    let name = cpus.model.as_str();
    if name.eq_ignore_ascii_case("none") {
        return Err(field(
            "cpus.model",
            "`none` is a processor without any feature, on which nothing boots".to_owned(),
            "use it as the base of a model of your own",
        ));
    }
    let model = load(name).map_err(|error| {
        field(
            "cpus.model",
            error.to_string(),
            "`vmm cpu models` lists the models, `vmm cpu explain FILE` checks a file",
        )
    })?;
    model.with_features(&cpus.features).map_err(|errors| {
        field(
            "cpus.features",
            list(&errors),
            "`vmm cpu explain MODEL` lists what a model has",
        )
    })
}

/// Checks what a config says of its model, as far as that needs no file.
pub(crate) fn check(cpus: &CpusConfig) -> Result<(), ConfigError> {
    if is_path(&cpus.model) {
        return Ok(());
    }
    resolve(cpus).map(drop)
}

/// Refuses an interface that this host cannot back.
pub(crate) fn check_interface(
    hypervisor: &dyn Hypervisor,
    interface: Interface,
) -> hypervisor::Result<()> {
    if interface == Interface::Hyperv && !can_be_portable(&hypervisor.enlightenments()?) {
        return Err(hypervisor::Error::Missing {
            what: "Hyper-V's reference counter, reference TSC and frequency registers, which a guest of the model \
                   `portable` tells the time by (KVM has them from Linux 5.11 on if it was built with CONFIG_KVM_HYPERV); \
                   the model `bare` does without",
        });
    }
    Ok(())
}

/// What a host can show a guest that sees this interface.
pub(crate) fn offered(
    hypervisor: &dyn Hypervisor,
    interface: Interface,
) -> hypervisor::Result<Cpuid> {
    check_interface(hypervisor, interface)?;
    Ok(of_interface(&hypervisor.supported_cpuid()?, interface))
}
