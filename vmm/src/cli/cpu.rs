//! `vmm cpu`: hosts and CPU models.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use arch::x86_64::cpu_model::{
    Comparison, CpuDump, CpuModel, Relation, baseline, bit_names, compare, feature_msr_name,
};
use arch::x86_64::cpuid::features::{self, Feature};
use clap::{Args, Subcommand};
use hypervisor::HypervisorKind;
use serde_json::json;

use super::{FAILED, HypervisorName};
use crate::cpu;

/// CPU models: which guests can run where, and what they are shown.
///
/// A host is described by a dump, which `vmm cpu dump` writes there. HOST stands for such a file, or for `host`: this one.
/// MODEL stands for a name that `vmm cpu models` lists, or for a file.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm cpu dump >host-a.json
  vmm cpu compare host-a.json host-b.json
  vmm cpu baseline host-a.json host-b.json >both.json
  vmm cpu explain both.json
  vmm cpu verify EPYC-Rome

A config uses a model by name or file, and changes it feature by feature:
  \"cpus\": { \"boot_vcpus\": 2, \"model\": \"x86-64-v3\", \"features\": { \"aes\": true, \"f16c\": false } }

A model file has a base and what differs from it:
  { \"name\": \"web\", \"base\": \"x86-64-v3\", \"features\": { \"aes\": true },
    \"cpuid\": [ { \"leaf\": \"0x7\", \"ebx\": \"xxxxxxxx_xxxxxxxx_xxxxxxxx_xxxxxx0x\" } ],
    \"msrs\": [ { \"index\": \"0x10a\", \"bits\": \"(64 of 0, 1, x)\" } ] }
and may say version, description, vendor, cross_vendor, signature (family, model, stepping), brand, physical_bits,
linear_bits and interface (host, hyperv: the clock that KVM and the Microsoft hypervisor both keep, none).")]
pub(super) struct CpuArgs {
    #[command(subcommand)]
    request: CpuRequest,
}

#[derive(Debug, Subcommand)]
enum CpuRequest {
    /// List the models that this version knows.
    Models,
    /// Describe this host as JSON: CPUID and feature registers that guests can have, microcode, kernel, TSC.
    Dump {
        /// Which hypervisor to ask [default: mshv where /dev/mshv exists, else kvm]
        #[arg(long, value_name = "NAME")]
        hypervisor: Option<HypervisorName>,
    },
    /// Say whether guests of the model `host` move from A to B and back, and what stands in the way.
    Compare {
        /// One host.
        #[arg(value_name = "A")]
        a: String,
        /// The other.
        #[arg(value_name = "B")]
        b: String,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Write the richest model that all of these hosts can run.
    Baseline {
        /// The hosts.
        #[arg(value_name = "HOST", required = true)]
        hosts: Vec<String>,
        /// The model's name.
        #[arg(long, default_value = "baseline")]
        name: String,
        /// Also for hosts of several vendors; guests are shown the first one's.
        #[arg(long)]
        cross_vendor: bool,
    },
    /// Say what a model comes to: features, bits, registers. Reports everything that is wrong with a file.
    Explain {
        /// The model.
        model: String,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Try a model on this host: what it cannot give, and what the hypervisor drops without a word. Exit status 1 if
    /// there is anything.
    Verify {
        /// The model.
        model: String,
        /// Which hypervisor to try [default: mshv where /dev/mshv exists, else kvm]
        #[arg(long, value_name = "NAME")]
        hypervisor: Option<HypervisorName>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// `vmm cpu`.
pub(super) fn cpu(args: CpuArgs) -> anyhow::Result<ExitCode> {
    match args.request {
        CpuRequest::Models => models(),
        CpuRequest::Dump { hypervisor } => {
            print_json(&this_host(hypervisor.map(Into::into))?)?;
        }
        CpuRequest::Compare { a, b, json } => {
            let comparison = compare(&host(&a)?, &host(&b)?);
            if json {
                print_json(&comparison)?;
            } else {
                print(&comparison_text(&a, &b, &comparison));
            }
        }
        CpuRequest::Baseline {
            hosts,
            name,
            cross_vendor,
        } => {
            let hosts: Vec<CpuDump> = hosts
                .iter()
                .map(|name| host(name))
                .collect::<anyhow::Result<_>>()?;
            let spec = baseline(&name, &hosts, cross_vendor)?;
            if let Err(errors) = CpuModel::from_spec(&spec) {
                bail!("the baseline is no model: {}", cpu::list(&errors));
            }
            print_json(&spec)?;
        }
        CpuRequest::Explain { model, json } => {
            let model = cpu::load(&model)?;
            if json {
                print_json(&model_json(&model))?;
            } else {
                print(&model_text(&model));
            }
        }
        CpuRequest::Verify {
            model,
            hypervisor,
            json,
        } => return verify(&model, hypervisor.map(Into::into), json),
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?));
    Ok(())
}

/// The host that a word on the command line stands for.
fn host(name: &str) -> anyhow::Result<CpuDump> {
    if name == "host" {
        return this_host(None);
    }
    let json = crate::json::read_file(Path::new(name)).map_err(anyhow::Error::msg)?;
    crate::json::parse(&json)
        .map_err(|error| anyhow::anyhow!("{name}: {error}"))
        .context("not a dump of a host, as `vmm cpu dump` writes it")
}

fn this_host(hypervisor: Option<HypervisorKind>) -> anyhow::Result<CpuDump> {
    let hypervisor = crate::machine::open_hypervisor(hypervisor)?;
    Ok(cpu::dump(&*hypervisor)?)
}

fn models() {
    let lines =
        CpuModel::builtins().map(|model| format!("{:22} {}\n", model.name, model.description));
    print(&lines.collect::<String>());
}

fn comparison_text(a: &str, b: &str, comparison: &Comparison) -> String {
    let mut text = match comparison.relation {
        Relation::Identical => format!("identical: guests move from {a} to {b} and back\n"),
        Relation::Subset => {
            format!("subset: guests of {a} move to {b}, guests of {b} do not move to {a}\n")
        }
        Relation::Superset => {
            format!("superset: guests of {a} do not move to {b}, guests of {b} move to {a}\n")
        }
        Relation::Incompatible => {
            format!("incompatible: guests move neither from {a} to {b} nor back\n")
        }
    };
    for (name, lacks) in [(a, &comparison.only_a), (b, &comparison.only_b)] {
        if !lacks.is_empty() {
            text.push_str(&format!("only {name} has:\n"));
        }
        for lack in lacks {
            text.push_str(&format!("  {lack}\n"));
        }
    }
    for note in &comparison.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    for advice in &comparison.advice {
        text.push_str(&format!("advice: {advice}\n"));
    }
    text
}

/// Words in lines of about 100 characters.
fn wrapped<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let mut text = String::new();
    let mut length = 0;
    for word in words {
        if length + word.len() > 98 {
            text.push('\n');
            length = 0;
        }
        text.push_str(if length == 0 { "  " } else { " " });
        text.push_str(word);
        length += word.len() + 1;
    }
    text.push('\n');
    text
}

fn model_text(model: &CpuModel) -> String {
    let mut text = format!("{}, version {}", model.name, model.version);
    if !model.description.is_empty() {
        text.push_str(&format!(": {}", model.description));
    }
    text.push('\n');
    if !model.bases.is_empty() {
        text.push_str(&format!("made from {}\n", model.bases.join(", ")));
    }
    text.push_str(&format!(
        "vendor: {}{}\n",
        model.vendor.as_deref().unwrap_or("the host's"),
        if model.cross_vendor {
            ", on hosts of other vendors too"
        } else {
            ""
        }
    ));
    match model.signature {
        Some(s) => text.push_str(&format!(
            "family {}, model {}, stepping {}\n",
            s.family, s.model, s.stepping
        )),
        None => text.push_str("family, model and stepping: the host's\n"),
    }
    text.push_str(&format!("interface: {}\n", model.interface));
    for (what, bits) in [
        ("physical", model.physical_bits),
        ("linear", model.linear_bits),
    ] {
        if let Some(bits) = bits {
            text.push_str(&format!("{what} addresses: at most {bits} bits\n"));
        }
    }
    if model.open {
        text.push_str("features: everything that the host has\n");
        if !model.off.is_empty() {
            text.push_str("but not:\n");
            text.push_str(&wrapped(model.off.iter().copied()));
        }
        if !model.on.is_empty() {
            text.push_str("certainly:\n");
            text.push_str(&wrapped(model.on.iter().copied()));
        }
    } else {
        text.push_str(&format!("features ({}), and no others:\n", model.on.len()));
        text.push_str(&wrapped(model.on.iter().copied()));
    }
    for (place, bits) in model.patterns() {
        text.push_str(&format!("{place}: {bits}\n"));
    }
    for (index, bits) in &model.msrs {
        let name = feature_msr_name(*index).unwrap_or("MSR");
        text.push_str(&format!(
            "{name} (MSR {index:#x}): {}\n",
            match bit_names(*index, bits.ones()).as_str() {
                "" => "no bit set",
                names => names,
            }
        ));
    }
    text
}

fn model_json(model: &CpuModel) -> serde_json::Value {
    json!({
        "name": model.name,
        "version": model.version,
        "description": model.description,
        "bases": model.bases,
        "open": model.open,
        "interface": model.interface,
        "vendor": model.vendor,
        "cross_vendor": model.cross_vendor,
        "signature": model.signature,
        "brand": model.brand,
        "physical_bits": model.physical_bits,
        "linear_bits": model.linear_bits,
        "on": model.on,
        "off": model.off,
        "patterns": model.patterns().collect::<std::collections::BTreeMap<_, _>>(),
        "msrs": model
            .msrs
            .iter()
            .map(|(index, bits)| (format!("{index:#x}"), bits))
            .collect::<std::collections::BTreeMap<_, _>>(),
    })
}

fn verify(
    name: &str,
    hypervisor: Option<HypervisorKind>,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let model = cpu::load(name)?;
    let hypervisor = crate::machine::open_hypervisor(hypervisor)?;
    let verdict = cpu::verify(&*hypervisor, &model)?;
    let good = [
        verdict.missing.len(),
        verdict.dropped.len(),
        verdict.excess.len(),
    ] == [0; 3];
    if as_json {
        print_json(&json!({
            "model": model.name,
            "hypervisor": hypervisor.kind(),
            "runs": verdict.missing.is_empty(),
            "missing": verdict.missing.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "dropped": verdict.dropped,
            "excess": verdict.excess,
            "notes": verdict.notes,
            "features": verdict.shown.iter().map(|f: &&Feature| f.name).collect::<Vec<_>>(),
        }))?;
    } else {
        print(&verdict_text(
            model.name.as_str(),
            hypervisor.kind(),
            &verdict,
        ));
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    })
}

fn verdict_text(model: &str, hypervisor: HypervisorKind, verdict: &cpu::Verdict) -> String {
    if !verdict.missing.is_empty() {
        let mut text =
            format!("this host ({hypervisor}) cannot run a guest of the model {model}:\n");
        for missing in &verdict.missing {
            text.push_str(&format!("  {missing}\n"));
        }
        return text;
    }
    let mut text = format!("a guest of the model {model} runs on this host ({hypervisor})\n");
    for dropped in &verdict.dropped {
        text.push_str(&format!("but the hypervisor drops {dropped}\n"));
    }
    for excess in &verdict.excess {
        text.push_str(&format!("but the hypervisor cannot hide {excess}\n"));
    }
    for note in &verdict.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text.push_str(&format!(
        "it is shown {} of {} known features:\n",
        verdict.shown.len(),
        features::all().count()
    ));
    text.push_str(&wrapped(verdict.shown.iter().map(|feature| feature.name)));
    text
}

/// Prints to standard output. Whoever reads only the beginning has seen what they wanted.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
