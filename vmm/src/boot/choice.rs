//! Which kernel a file system wants to be booted.

use std::cmp::Ordering;

use super::files::Files;

/// Most entries that are read.
const MOST_ENTRIES: usize = 64;
/// Folders that boot files are in: a root file system's, and that of a boot partition.
const FOLDERS: [&str; 2] = ["/boot", ""];

/// What to boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Choice {
    /// What named it.
    pub(super) by: String,
    pub(super) kernel: String,
    pub(super) initramfs: Vec<String>,
    pub(super) cmdline: String,
}

/// Chooses, or says what was looked for.
pub(super) fn choose(files: &Files) -> Result<Choice, String> {
    let found = FOLDERS
        .iter()
        .find_map(|folder| entries(files, folder))
        .or_else(|| FOLDERS.iter().find_map(|folder| grub(files, folder)))
        .or_else(|| links(files))
        .or_else(|| FOLDERS.iter().find_map(|folder| newest(files, folder)));
    found.ok_or_else(|| {
        "no kernel: neither loader/entries/*.conf nor grub/grub.cfg name one, and there is no vmlinuz in / or /boot".to_owned()
    })
}

/// Makes paths of an entry paths of the file system, if all of the files are there: they are those of the root, or of the folder that is
/// mounted at /boot there.
fn located(files: &Files, choice: Choice) -> Option<Choice> {
    FOLDERS.iter().rev().find_map(|folder| {
        let there = |path: &String| {
            let path = format!("{folder}/{}", path.trim_start_matches('/'));
            files.is_file(&path).then_some(path)
        };
        Some(Choice {
            kernel: there(&choice.kernel)?,
            initramfs: choice.initramfs.iter().map(there).collect::<Option<_>>()?,
            ..choice.clone()
        })
    })
}

/// Entries of the Boot Loader Specification: the default of loader.conf, or else the newest.
fn entries(files: &Files, folder: &str) -> Option<Choice> {
    let place = format!("{folder}/loader/entries");
    let mut names = files.names(&place);
    names.retain(|name| name.ends_with(".conf"));
    names.truncate(MOST_ENTRIES);
    let wanted = files
        .text(&format!("{folder}/loader/loader.conf"))
        .and_then(|text| value(&text, "default"));
    let mut all: Vec<_> = names
        .into_iter()
        .filter_map(|name| {
            let path = format!("{place}/{name}");
            let (version, choice) = entry(&files.text(&path)?, path)?;
            Some((name, version, located(files, choice)?))
        })
        .collect();
    let is_wanted = |name: &str| {
        wanted
            .as_ref()
            .is_some_and(|wanted| match wanted.strip_suffix('*') {
                Some(start) => name.starts_with(start),
                None => name.trim_end_matches(".conf") == wanted.trim_end_matches(".conf"),
            })
    };
    all.sort_by(|(name, version, _), (other, other_version, _)| {
        let first = is_wanted(name).cmp(&is_wanted(other));
        first
            .then_with(|| compare(version, other_version))
            .then_with(|| compare(name, other))
    });
    all.pop().map(|(_, _, choice)| choice)
}

/// The last value of a key.
fn value(text: &str, key: &str) -> Option<String> {
    let mut lines = text.lines().rev();
    lines.find_map(|line| {
        let (found, value) = line.trim().split_once(char::is_whitespace)?;
        (found == key).then(|| value.trim().to_owned())
    })
}

/// An entry's version, and what it boots; none if it is not of this kind, or has variables of a boot loader in it.
fn entry(text: &str, by: String) -> Option<(String, Choice)> {
    let mut choice = Choice {
        by,
        ..Choice::default()
    };
    let (mut version, mut options) = (String::new(), Vec::new());
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(char::is_whitespace) else {
            continue;
        };
        let value = value.trim();
        match key {
            "version" => version = value.to_owned(),
            "linux" => choice.kernel = value.to_owned(),
            "initrd" => choice
                .initramfs
                .extend(value.split_whitespace().map(str::to_owned)),
            "options" => options.push(value.to_owned()),
            _ => {}
        }
    }
    choice.cmdline = options.join(" ");
    let variables = [&choice.kernel, &choice.cmdline]
        .iter()
        .any(|text| text.contains('$'));
    (!choice.kernel.is_empty() && !variables).then_some((version, choice))
}

/// The default entry of a grub.cfg as `grub-mkconfig` writes it.
fn grub(files: &Files, folder: &str) -> Option<Choice> {
    ["grub", "grub2"].iter().find_map(|name| {
        let path = format!("{folder}/{name}/grub.cfg");
        let (default, entries) = menu(&files.text(&path)?, &path);
        // Not there: the first, as GRUB does.
        let chosen = entries.iter().position(|(title, _)| *title == default);
        let chosen = chosen.or_else(|| default.parse().ok()).unwrap_or(0);
        let (_, choice) = entries.get(chosen).or_else(|| entries.first())?;
        located(files, choice.clone())
    })
}

/// The name or number of the default, and the entries of the menu; of a submenu, its first entry stands for it.
fn menu(text: &str, by: &str) -> (String, Vec<(String, Choice)>) {
    let (mut default, mut entries) = (String::new(), Vec::<(String, Choice)>::new());
    // Blocks that are open, and whether each is an entry or a submenu.
    let mut open: Vec<bool> = Vec::new();
    for line in text.lines() {
        let words = words(line);
        let first = words.first().map(String::as_str);
        match first {
            Some("set") => {
                let value = words.get(1).and_then(|word| word.strip_prefix("default="));
                // Of several, those with variables depend on what is not known here.
                if let Some(value) = value.filter(|value| !value.contains('$')) {
                    value.clone_into(&mut default);
                }
            }
            Some("menuentry" | "submenu")
                if !open.contains(&true) && entries.len() < MOST_ENTRIES =>
            {
                let title = words.get(1).cloned().unwrap_or_default();
                let by = by.to_owned();
                let choice = Choice {
                    by,
                    ..Choice::default()
                };
                entries.push((title, choice));
            }
            Some("linux" | "linux16" | "linuxefi") if open.contains(&true) => {
                let mut rest = words.into_iter().skip(1);
                if let Some((_, choice)) = entries
                    .last_mut()
                    .filter(|(_, choice)| choice.kernel.is_empty())
                {
                    choice.kernel = rest.next().unwrap_or_default();
                    // A variable that is not set is nothing.
                    let options: Vec<_> = rest.filter(|word| !word.contains('$')).collect();
                    choice.cmdline = options.join(" ");
                }
                continue;
            }
            Some("initrd" | "initrd16" | "initrdefi") if open.contains(&true) => {
                if let Some((_, choice)) = entries
                    .last_mut()
                    .filter(|(_, choice)| choice.initramfs.is_empty())
                {
                    choice.initramfs = words.into_iter().skip(1).collect();
                }
                continue;
            }
            _ => {}
        }
        if line.trim_end().ends_with('{') {
            open.push(matches!(first, Some("menuentry" | "submenu")));
        } else if line.trim() == "}" {
            open.pop();
        }
    }
    (default, entries)
}

/// The words of a line, without the quotes around them.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for character in line.chars() {
        match (character, quote) {
            ('#', None) if word.is_none() => break,
            ('\'' | '"', None) => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (character, Some(open)) if character == open => quote = None,
            (character, None) if character.is_whitespace() => words.extend(word.take()),
            (character, _) => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

/// The links that Debian keeps to the newest kernel.
fn links(files: &Files) -> Option<Choice> {
    FOLDERS.iter().rev().find_map(|folder| {
        let kernel = format!("{folder}/vmlinuz");
        let initramfs = format!("{folder}/initrd.img");
        files.is_file(&kernel).then(|| Choice {
            by: kernel.clone(),
            initramfs: Some(initramfs)
                .filter(|path| files.is_file(path))
                .into_iter()
                .collect(),
            kernel,
            cmdline: String::new(),
        })
    })
}

/// The newest kernel by the version in its name.
fn newest(files: &Files, folder: &str) -> Option<Choice> {
    let names = files.names(if folder.is_empty() { "/" } else { folder });
    let versions = names
        .iter()
        .filter_map(|name| name.strip_prefix("vmlinuz-"));
    let version = versions
        .filter(|version| files.is_file(&format!("{folder}/vmlinuz-{version}")))
        .max_by(|one, other| compare(one, other))?;
    let initramfs = [
        format!("{folder}/initrd.img-{version}"),
        format!("{folder}/initramfs-{version}.img"),
    ];
    Some(Choice {
        by: format!("{folder}/vmlinuz-*"),
        kernel: format!("{folder}/vmlinuz-{version}"),
        initramfs: initramfs
            .into_iter()
            .find(|path| files.is_file(path))
            .into_iter()
            .collect(),
        cmdline: String::new(),
    })
}

/// Debian's order of versions (Debian Policy, section 5.6.12): parts that are no digits, then numbers, in turn; a tilde is before the end.
fn compare(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one.as_bytes(), other.as_bytes());
    while !one.is_empty() || !other.is_empty() {
        let (text, other_text) = (part(&mut one, false), part(&mut other, false));
        let weight = |bytes: &[u8], at: usize| match bytes.get(at) {
            None => 0,
            Some(b'~') => -1,
            Some(byte) if byte.is_ascii_alphabetic() => i32::from(*byte),
            Some(byte) => i32::from(*byte) + 256,
        };
        for at in 0..text.len().max(other_text.len()) {
            let order = weight(text, at).cmp(&weight(other_text, at));
            if order != Ordering::Equal {
                return order;
            }
        }
        let (digits, other_digits) = (part(&mut one, true), part(&mut other, true));
        let order = digits
            .len()
            .cmp(&other_digits.len())
            .then(digits.cmp(other_digits));
        if order != Ordering::Equal {
            return order;
        }
    }
    Ordering::Equal
}

/// Takes what is digits, without zeros before them, or is none.
fn part<'a>(bytes: &mut &'a [u8], digits: bool) -> &'a [u8] {
    let end = bytes
        .iter()
        .position(|byte| byte.is_ascii_digit() != digits);
    let (part, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
    *bytes = rest;
    match digits {
        true => &part[part.iter().take_while(|byte| **byte == b'0').count()..],
        false => part,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_in_debians_order() {
        let sorted = [
            "6.1.0-9-amd64",
            "6.1.0-10-amd64",
            "6.1.0-10-cloud-amd64",
            "6.12~rc1",
            "6.12",
            "6.12-1",
        ];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare("6.01", "6.1"), Ordering::Equal);
    }

    const GRUB: &str = r#"
set default="0"
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
fi
function load_video {
  insmod all_video
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'simple' {
	search --no-floppy --fs-uuid --set=root 1-2
	linux	/boot/vmlinuz-2 root=UUID=1-2 ro  "quiet" $vt_handoff
	initrd	/boot/initrd.img-2
}
submenu 'Advanced options' {
	menuentry 'older' {
		linux /boot/vmlinuz-1 root=UUID=1-2
	}
	menuentry 'oldest' {
		linux /boot/vmlinuz-0
	}
}
menuentry "other" { 
	linux /boot/other
}
"#;

    #[test]
    fn the_menu_of_grub() {
        let (default, entries) = menu(GRUB, "grub.cfg");
        assert_eq!(default, "0");
        let titles: Vec<_> = entries
            .iter()
            .map(|(title, choice)| (&**title, &*choice.kernel))
            .collect();
        assert_eq!(
            titles,
            [
                ("Debian GNU/Linux", "/boot/vmlinuz-2"),
                ("Advanced options", "/boot/vmlinuz-1"),
                ("other", "/boot/other")
            ]
        );
        assert_eq!(entries[0].1.cmdline, "root=UUID=1-2 ro quiet");
        assert_eq!(entries[0].1.initramfs, ["/boot/initrd.img-2"]);
        // Nothing that is written there makes it fail.
        for cut in 0..GRUB.len() {
            menu(&GRUB[cut..], "");
            menu(&GRUB[..cut], "");
        }
        menu(
            &"{\n}\n}\nlinux\ninitrd\nmenuentry\nset\nset default=\n".repeat(9),
            "",
        );
    }

    #[test]
    fn an_entry_of_the_specification() {
        let text = "# a comment\ntitle Debian\nversion 6.1\nlinux /vmlinuz\ninitrd /a /b\ninitrd /c\noptions root=/dev/vda1\noptions ro\n";
        let (version, choice) = entry(text, String::new()).expect("an entry");
        assert_eq!(
            (&*version, &*choice.kernel, &*choice.cmdline),
            ("6.1", "/vmlinuz", "root=/dev/vda1 ro")
        );
        assert_eq!(choice.initramfs, ["/a", "/b", "/c"]);
        assert_eq!(
            entry("linux /vmlinuz\noptions $kernelopts\n", String::new()),
            None
        );
        assert_eq!(entry("efi /shell.efi\n", String::new()), None);
    }
}
