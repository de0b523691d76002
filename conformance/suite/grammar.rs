//! What the server may send at all (PROTOCOL.md, "Grammar" and "Text"): every line that anybody
//! receives is looked at, whatever the transcript leaves open in it.

use crate::stage::LONGEST_LINE;

/// An error says what is wrong with a line, its CRLF taken away.
pub fn check(line: &[u8]) -> Result<(), String> {
    let Ok(text) = std::str::from_utf8(line) else {
        return Err("a line that is not UTF-8".to_owned());
    };
    if line.len() + 2 > LONGEST_LINE {
        return Err(format!("a line of {} bytes", line.len() + 2));
    }
    if text.chars().any(is_forbidden) {
        return Err("a line with a character that Text excludes".to_owned());
    }
    match has_form(text) {
        true => Ok(()),
        false => Err(format!("a line that the grammar does not allow: {text}")),
    }
}

/// What PROTOCOL.md, "Text", excludes.
fn is_forbidden(character: char) -> bool {
    match character {
        '\t' => false,
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        _ => character.is_control(),
    }
}

fn has_form(text: &str) -> bool {
    let (keyword, rest) = match text.split_once(' ') {
        Some((keyword, rest)) => (keyword, Some(rest)),
        None => (text, None),
    };
    // A space is never the last thing where text may follow it.
    let (has_text, is_optional) = (rest.is_some_and(|rest| !rest.is_empty()), rest != Some(""));
    let words: Vec<_> = rest.unwrap_or_default().split(' ').collect();
    match (keyword, words.as_slice()) {
        ("HELLO", ["linechat/1", ..]) => !text.ends_with("/1 "),
        ("WELCOME" | "JOINED", [name, count]) => !name.is_empty() && is_count(count),
        ("LEFT", [name, count, "quit" | "disconnected" | "slow"]) => {
            !name.is_empty() && is_count(count)
        }
        ("USERS", [count, names @ ..]) => {
            is_count(count) && !names.is_empty() && names.iter().all(|name| !name.is_empty())
        }
        ("MSG" | "PRIV" | "SENT", [name, ..]) => {
            !name.is_empty() && words.len() > 1 && text.len() > keyword.len() + name.len() + 2
        }
        ("HELP", _) => has_text,
        ("PONG" | "BYE", _) => is_optional,
        ("ERR", [code, ..]) => is_code(code) && (words.len() < 2 || text.len() > code.len() + 5),
        _ => false,
    }
}

fn is_count(word: &str) -> bool {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    digits && !word.is_empty() && (word == "0" || !word.starts_with('0'))
}

fn is_code(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-')
}

fn has_keyword(line: &[u8], keywords: &[&str]) -> bool {
    let word = line.split(|&byte| byte == b' ').next().unwrap_or_default();
    keywords.iter().any(|keyword| keyword.as_bytes() == word)
}

/// Whether everybody in the room may receive this.
pub fn is_public(line: &[u8]) -> bool {
    is_news(line) || has_keyword(line, &["USERS"])
}

/// Whether all others in the room receive this when one of them does.
pub fn is_news(line: &[u8]) -> bool {
    has_keyword(line, &["MSG", "JOINED", "LEFT"])
}
