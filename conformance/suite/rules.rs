//! What PROTOCOL.md says about every line from a server (its sections Text, Grammar and Joining,
//! leaving, roster). Each line that a client receives is checked, whatever the transcript leaves
//! open in it.

/// The longest line from the server, in bytes, with CR LF.
pub const MAX_LINE: usize = 4096;
/// The largest room to which rosters are pushed.
pub const MAX_PUSHED_ROSTER: usize = 100;

/// Checks a line without its CR LF. The error says what is wrong with it.
pub fn check(line: &[u8]) -> Result<(), String> {
    let Ok(text) = std::str::from_utf8(line) else {
        return Err("a line that is not UTF-8".to_owned());
    };
    if line.len() + 2 > MAX_LINE {
        return Err(format!("a line of {} bytes", line.len() + 2));
    }
    if text.chars().any(is_forbidden) {
        return Err("a line with a character that Text excludes".to_owned());
    }
    match has_form(text) {
        true => Ok(()),
        false => Err(format!("a line that the grammar does not allow: '{text}'")),
    }
}

/// PROTOCOL.md, "Text".
fn is_forbidden(character: char) -> bool {
    match character {
        '\t' => false,
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        _ => character.is_control(),
    }
}

/// PROTOCOL.md, "Grammar".
fn has_form(text: &str) -> bool {
    let words: Vec<_> = text.split(' ').collect();
    // `[ SP text ]`: a space is never the last thing where text may follow it.
    let is_optional = |before: &str| text.len() != before.len() + 1;
    match words.as_slice() {
        ["HELLO", "linechat/1", ..] => is_optional("HELLO linechat/1"),
        ["WELCOME" | "JOINED", name, count] => !name.is_empty() && is_count(count),
        ["LEFT", name, count, "quit" | "disconnected" | "slow"] => {
            !name.is_empty() && is_count(count)
        }
        ["USERS", count, names @ ..] => {
            is_count(count) && !names.is_empty() && names.iter().all(|name| !name.is_empty())
        }
        [verb @ ("MSG" | "PRIV" | "SENT"), name, _, ..] => {
            !name.is_empty() && text.len() > verb.len() + name.len() + 2
        }
        ["HELP", _, ..] => text.len() > "HELP ".len(),
        [verb @ ("PONG" | "BYE"), ..] => is_optional(verb),
        ["ERR", code, ..] => is_code(code) && is_optional(&format!("ERR {code}")),
        _ => false,
    }
}

fn is_count(word: &str) -> bool {
    word.parse::<u64>().is_ok_and(|count| count.to_string() == word)
}

fn is_code(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-')
}

/// The lines of a roster, without their CR LF.
pub fn roster(names: &[String]) -> Vec<String> {
    let mut lines = Vec::<String>::new();
    for name in names {
        match lines.last_mut() {
            Some(last) if last.len() + 1 + name.len() + 2 <= MAX_LINE => {
                *last += &format!(" {name}")
            }
            _ => lines.push(format!("USERS {} {name}", names.len())),
        }
    }
    lines
}
