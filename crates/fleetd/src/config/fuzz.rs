//! For fuzzing: files of configuration as any text.

use super::{Config, ConfigError, ConfigFile, Environment, Flags};

/// Reads the text of a file. Returns what came of it, in words.
///
/// # Panics
/// When a message can't be shown as it is.
pub fn file(text: &str) -> String {
    let given = ConfigFile::Given("/fleet.conf".into());
    let read = Config::from_sources(&Flags::default(), &Environment::new(), given, text);
    let lines = 1 + text.matches('\n').count();
    let shown = |message: &str| {
        assert!(!message.chars().any(char::is_control), "a control character in {message:?}");
    };
    match read {
        Ok((config, warnings)) => {
            warnings.iter().for_each(|warning| shown(&warning.to_string()));
            let messages: Vec<_> = warnings.iter().map(|warning| warning.message.as_str()).take(3).collect();
            let etcd = config.etcd.servers.len().min(3);
            let kinds = (config.listen.len().min(3), config.join.len().min(3), config.metadata.len().min(3));
            format!("{etcd} servers {kinds:?} {}", messages.join(" "))
        }
        Err(error) => {
            shown(&error.to_string());
            if let ConfigError::Syntax { origin: super::Origin::Line(_, line), .. } = &error {
                assert!((1..=lines).contains(line), "line {line} of {lines}");
            }
            error.to_string()
        }
    }
}
