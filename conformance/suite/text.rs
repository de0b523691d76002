//! The texts of transcripts: what they stand for, and whether something received is that.
//! `conformance/README.md`, "Texts", describes how they are written.

/// A text of a transcript: pieces, with any text or none between each two.
#[derive(Debug, Default)]
pub struct Pattern(pub Vec<Vec<u8>>);

impl Pattern {
    /// `known` returns what `{server}` or `{ana's address}` stands for, which is only known while the
    /// transcript is played; `None` stands for any text.
    pub fn parse(text: &str, known: &dyn Fn(&str) -> Option<Vec<u8>>) -> Result<Pattern, String> {
        let mut pieces = vec![Vec::new()];
        let mut rest = text;
        while let Some(character) = rest.chars().next() {
            rest = &rest[character.len_utf8()..];
            let bytes = match character {
                '\\' => Some(parse_escape(&mut rest)?),
                '*' => None,
                '{' => {
                    let (inside, after) = rest.split_once(outside('}')).ok_or("'{' without '}'")?;
                    rest = after;
                    match inside == "server" || inside.ends_with("'s address") {
                        true => known(inside),
                        false => Some(parse_braces(inside)?),
                    }
                }
                _ => Some(character.to_string().into_bytes()),
            };
            match (bytes, pieces.last_mut()) {
                (Some(bytes), Some(piece)) => piece.extend(bytes),
                _ => pieces.push(Vec::new()),
            }
        }
        Ok(Pattern(pieces))
    }

    /// Returns true if `text` is this. A space and a `*` at the end may also be missing together, as
    /// PROTOCOL.md's `[ SP text ]` may.
    pub fn matches(&self, text: &[u8]) -> bool {
        let Some((first, pieces)) = self.0.split_first() else { return text.is_empty() };
        let fits = |text: &[u8]| match text.strip_prefix(first.as_slice()) {
            Some(text) => rest_matches(pieces, text),
            None => false,
        };
        let is_open = pieces.last().is_some_and(Vec::is_empty);
        fits(text) || is_open && fits(&[text, b" "].concat())
    }

    /// The error shows both.
    pub fn compare(&self, text: &[u8]) -> Result<(), String> {
        match self.matches(text) {
            true => Ok(()),
            false => Err(side_by_side(&self.show(), &show(text))),
        }
    }

    pub fn show(&self) -> String {
        self.0.iter().map(|piece| show(piece)).collect::<Vec<_>>().join("*")
    }
}

fn rest_matches(pieces: &[Vec<u8>], text: &[u8]) -> bool {
    let [piece, pieces @ ..] = pieces else { return text.is_empty() };
    let open = text.iter().take_while(|&&byte| byte >= b' ' || byte == b'\t').count();
    (0..=open).any(|skipped| {
        let rest = text[skipped..].strip_prefix(piece.as_slice());
        rest.is_some_and(|rest| rest_matches(pieces, rest))
    })
}

/// The bytes of a text in which nothing is open.
fn parse_plain(text: &str) -> Result<Vec<u8>, String> {
    match Pattern::parse(text, &|_| None)?.0.as_slice() {
        [bytes] => Ok(bytes.clone()),
        _ => Err("only plain text can stand here".to_owned()),
    }
}

/// For `str::split` and the like: finds this character where it stands outside braces.
pub fn outside(mark: char) -> impl FnMut(char) -> bool {
    let (mut depth, mut is_escaped) = (0, false);
    move |character| {
        let is_found = character == mark && depth == 0 && !is_escaped;
        match character {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        is_found
    }
}

/// `{x 20 times}`, or names as in `{p1..p20}`.
fn parse_braces(inside: &str) -> Result<Vec<u8>, String> {
    let repeated = inside.strip_suffix(" times").and_then(|it| it.rsplit_once(' '));
    let Some((unit, count)) = repeated else {
        return Ok(parse_names(inside)?.join(" ").into_bytes());
    };
    let count =
        count.parse().map_err(|_| format!("a number must stand before 'times': {{{inside}}}"))?;
    Ok(parse_plain(unit)?.repeat(count))
}

/// What stands after a backslash: `r`, `n`, `t`, `s` for a space, `xFF`, `u202E`, or a character
/// that would otherwise be special.
fn parse_escape(rest: &mut &str) -> Result<Vec<u8>, String> {
    let character = rest.chars().next().ok_or("a backslash at the end")?;
    *rest = &rest[character.len_utf8()..];
    let mut digits = |count: usize| {
        let digits = rest.get(..count).ok_or("too few digits")?;
        *rest = &rest[count..];
        u32::from_str_radix(digits, 16).map_err(|_| format!("not hexadecimal: {digits}"))
    };
    Ok(match character {
        'r' => vec![b'\r'],
        'n' => vec![b'\n'],
        't' => vec![b'\t'],
        's' => vec![b' '],
        'x' => vec![digits(2)? as u8],
        'u' => char::from_u32(digits(4)?).ok_or("no such character")?.to_string().into_bytes(),
        'U' => char::from_u32(digits(8)?).ok_or("no such character")?.to_string().into_bytes(),
        '\\' | '*' | '{' | '}' => vec![character as u8],
        _ => return Err(format!("unknown escape \\{character}")),
    })
}

/// Names with spaces between; `p1..p20` is twenty of them.
pub fn parse_names(text: &str) -> Result<Vec<String>, String> {
    let range = |word: &str| {
        let (first, last) = word.split_once("..")?;
        let stem = first.trim_end_matches(|c: char| c.is_ascii_digit());
        let (from, to) = (first.strip_prefix(stem)?, last.strip_prefix(stem)?);
        let (from, to): (u32, u32) = (from.parse().ok()?, to.parse().ok()?);
        Some((from..=to).map(|number| format!("{stem}{number}")).collect())
    };
    let words = text.split(outside(' ')).filter(|word| !word.is_empty());
    let names = words.map(|word| {
        let word = String::from_utf8(parse_plain(word)?);
        let word = word.map_err(|_| "a name is UTF-8".to_owned())?;
        Ok(range(&word).unwrap_or(vec![word]))
    });
    Ok(names.collect::<Result<Vec<_>, String>>()?.concat())
}

/// Bytes as transcripts write them, whole: what is shown can be copied into one.
pub fn show(bytes: &[u8]) -> String {
    let mut shown = String::new();
    for chunk in bytes.utf8_chunks() {
        let mut characters = chunk.valid().chars().peekable();
        while let Some(character) = characters.next() {
            let mut count = 1;
            while characters.next_if_eq(&character).is_some() {
                count += 1;
            }
            let one = show_character(character);
            match count > MANY {
                true => shown += &format!("{{{one} {count} times}}"),
                false => shown += &one.repeat(count),
            }
        }
        chunk.invalid().iter().for_each(|byte| shown += &format!("\\x{byte:02X}"));
    }
    shown
}

/// A character that is repeated more often than this is shown once, with its count.
const MANY: usize = 20;

fn show_character(character: char) -> String {
    match character {
        '\r' => "\\r".to_owned(),
        '\n' => "\\n".to_owned(),
        '\t' => "\\t".to_owned(),
        '\\' | '*' | '{' | '}' => format!("\\{character}"),
        ' '..='~' => character.to_string(),
        '\0'..='\x7f' => format!("\\x{:02X}", u32::from(character)),
        // `escape_debug` escapes what cannot be seen.
        _ if character.escape_debug().len() == 1 => character.to_string(),
        '\u{80}'..='\u{ffff}' => format!("\\u{:04X}", u32::from(character)),
        _ => format!("\\U{:08X}", u32::from(character)),
    }
}

pub fn side_by_side(expected: &str, received: &str) -> String {
    format!("expected: {expected}\nreceived: {received}")
}
