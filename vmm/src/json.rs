//! Reading JSON that somebody else wrote.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Reads a file that is meant to be a config, a model or a dump. The error names it.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let wrong = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut contents = Vec::new();
    // Counted while it is read: a pipe or a device has no length beforehand.
    let file = File::open(path).map_err(wrong)?;
    file.take(MAX_FILE + 1)
        .read_to_end(&mut contents)
        .map_err(wrong)?;
    if contents.len() as u64 > MAX_FILE {
        return Err(format!(
            "{}: more than {MAX_FILE} bytes; is it the right file?",
            path.display()
        ));
    }
    Ok(contents)
}

/// Parses a whole JSON text. The error names the field, what is wrong with it, and where it stands.
pub(crate) fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(describe)?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(value)
}

/// Turns parsed JSON into a value. The error names the field and what is wrong with it.
pub(crate) fn from_value<T: DeserializeOwned>(json: serde_json::Value) -> Result<T, String> {
    serde_path_to_error::deserialize(json).map_err(describe)
}

fn describe(error: serde_path_to_error::Error<serde_json::Error>) -> String {
    match error.path().to_string().as_str() {
        // At the root there is no field to name.
        "." => error.into_inner().to_string(),
        path => format!("{path}: {}", error.inner()),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        inner: Inner,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        number: u8,
    }

    #[test]
    fn errors_name_the_field() {
        let parsed: Outer = parse(br#" {"inner": {"number": 7}} "#).expect("valid");
        assert_eq!(parsed.inner.number, 7);
        let wrong = [
            (
                r#"{"inner": {"number": "7"}}"#,
                "inner.number: invalid type: string",
            ),
            (
                r#"{"inner": {"number": 256}}"#,
                "inner.number: invalid value: integer `256`",
            ),
            (r#"{"inner": {}}"#, "inner: missing field `number`"),
            (
                r#"{"inner": {"number": 7, "letter": 1}}"#,
                "unknown field `letter`",
            ),
            (r#"{}"#, "missing field `inner`"),
            (
                r#"{"inner": {"number": 7}} x"#,
                "trailing characters at line 1 column 26",
            ),
            (r#"{"inner": "#, "EOF"),
            ("", "EOF"),
        ];
        for (json, part) in wrong {
            let error = parse::<Outer>(json.as_bytes()).expect_err(json);
            assert!(error.contains(part), "{json}: {error}");
        }
    }
}
