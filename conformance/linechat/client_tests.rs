//! Unit tests of linechat-client: typed lines, keys, the editor, the screen, the texts, time-outs,
//! and reconnecting. The transcripts show what a user sees.

use super::*;
use std::sync::mpsc::{channel, sync_channel};

/// Returns the text that a command line asks for, and the options that it sets.
fn words(arguments: &[&str]) -> Result<(Option<Text>, Options), (Text, String)> {
    let mut options = Options::default();
    let command = options.parse(arguments.iter().map(|&word| word.to_owned()).collect())?;
    Ok((command, options))
}

/// A client that has received WELCOME, and the lines that it sends from then on.
fn welcomed(screen: Screen) -> (Client, Receiver<String>) {
    let (mut client, sent) = greeted(Some("ana"), screen);
    client.arrived("WELCOME ana 2").unwrap();
    sent.try_iter().for_each(drop);
    (client, sent)
}

/// A client that has received HELLO, and the lines that it sends.
fn greeted(name: Option<&str>, screen: Screen) -> (Client, Receiver<String>) {
    let (mut client, sent) = connected(name, screen);
    assert_eq!(client.arrived("HELLO linechat/1 hi"), Ok(()));
    (client, sent)
}

fn connected(name: Option<&str>, screen: Screen) -> (Client, Receiver<String>) {
    let (client, connections) = connecting(name, screen);
    (client, connections.recv().unwrap())
}

/// A connected client, and the lines that it sends on each of its connections.
fn connecting(name: Option<&str>, screen: Screen) -> (Client, Receiver<Receiver<String>>) {
    let (connections, attempts) = channel();
    let connect = move |_| {
        let (out, sent) = sync_channel(MAX_QUEUED);
        let _ = connections.send(sent);
        out
    };
    let (host, name) = ("host".to_owned(), name.map(str::to_owned));
    let options = Options { host, port: 9999, name, rings: true, ..Options::default() };
    let mut client = Client::new(options, screen, Box::new(connect));
    client.handle(Event::Server(1, News::Connected)).unwrap();
    (client, attempts)
}

fn plain() -> Screen {
    Screen::default()
}

/// A terminal with this many columns.
fn terminal(columns: usize) -> Screen {
    Screen { has_editor: true, columns, ..Screen::default() }
}

fn type_in(client: &mut Client, keys: &str) {
    client.typed(keys.as_bytes()).unwrap();
}

fn line_being_typed(client: &Client) -> &str {
    &client.screen.editor.line
}

// Typed lines

#[test]
fn lines_are_text_private_messages_or_commands() {
    let mut roster = Roster::default();
    roster.add("Bob");
    roster.add("me");
    let parse = |line: &str| parse(line, "ana", &roster);
    let say = |text: &str| Typed::Request(Request::Say(text.to_owned()));
    let whisper = |mark: char, to: &str, text: &str| {
        Typed::Request(Request::Whisper { mark, to: to.to_owned(), text: text.to_owned() })
    };
    let mistake = |text: Text, word: &str| Typed::Mistake(text, word.to_owned());
    assert_eq!(parse(""), Typed::Nothing);
    assert_eq!(parse("  "), Typed::Nothing);
    assert_eq!(parse(" hello "), say(" hello "));
    assert_eq!(parse("//list"), say("/list"));
    assert_eq!(parse("@bob  hi"), whisper('@', "bob", " hi"));
    assert_eq!(parse("/bob hi"), whisper('/', "bob", "hi"));
    assert_eq!(parse("@list hi"), whisper('@', "list", "hi"));
    assert_eq!(parse("/msg bob hi"), whisper('@', "bob", "hi"));
    assert_eq!(parse("/msg @bob hi"), whisper('@', "bob", "hi"));
    // A leading space does not make a private message public.
    assert_eq!(parse(" @bob secret"), whisper('@', "bob", "secret"));
    assert_eq!(parse("\t/quit"), Typed::Quit);
    for list in ["/list", "/clientes", "/LIST ", "/who", "/names", "/w", "/lista", "/usuários"] {
        assert_eq!(parse(list), Typed::Request(Request::List));
    }
    for quit in ["/quit", "/sair", "/exit", "/bye", "/q", " /quit"] {
        assert_eq!(parse(quit), Typed::Quit);
    }
    for help in ["/help", "/?", "/ajuda"] {
        assert_eq!(parse(help), Typed::Help);
    }
    for nothing in ["@bob", "@eve ", "/bob"] {
        assert_eq!(parse(nothing), mistake(text::NOTHING_SAID, nothing.trim_end()));
    }
    assert_eq!(parse("/quit now"), mistake(text::TAKES_NOTHING, "quit"));
    assert_eq!(parse("/lits"), mistake(text::NO_SUCH_COMMAND, "lits"));
    // A member with that name does not receive it.
    assert_eq!(parse("/me waves"), say("* ana waves"));
    assert_eq!(parse("/me"), mistake(text::NOTHING_SAID, "/me"));
    assert_eq!(parse("/w bob hi"), whisper('@', "bob", "hi"));
    assert_eq!(parse("/msg"), mistake(text::NOTHING_SAID, "/msg"));
    // A colon after the name is not part of it.
    assert_eq!(parse("@bob: hi"), whisper('@', "bob", "hi"));
    assert_eq!(parse("@bob, hi"), whisper('@', "bob", "hi"));
    assert_eq!(parse("@@bob are you coming?"), say("@bob are you coming?"));
    for (line, mark) in [("/ hello", "/"), ("@ bob hi", "@"), ("@", "@"), ("/", "/")] {
        assert_eq!(parse(line), mistake(text::NO_NAME_AFTER, mark), "{line}");
    }
    assert_eq!(parse("@me hi"), whisper('@', "me", "hi"));
}

#[test]
fn a_piped_line_is_said_as_it_is() {
    let (mut client, sent) = welcomed(plain());
    client.options.is_piped = true;
    let lines = "/dev/vda\n@bob disk\n  //x \n\n/quit\nlast";
    let (keyboard, typed) = mpsc::sync_channel(8);
    let (events, _happened) = mpsc::sync_channel(8);
    read_input(lines.as_bytes(), false, &keyboard, &events);
    // The next line is taken when the one before was sent.
    client.take_input(&typed).unwrap();
    let requests: Vec<_> = sent.try_iter().map(|it| it.replace('\n', " ")).collect();
    let expected = ["/dev/vda", "@bob disk", "  //x ", "/quit", "last"];
    let expected = (1..).zip(expected).map(|(n, it)| format!("MSG {it} PING {n} "));
    assert_eq!(requests, expected.chain(["QUIT ".to_owned()]).collect::<Vec<_>>());
}

#[test]
fn a_request_fits_into_a_line_or_is_not_sent() {
    let (mut client, sent) = welcomed(plain());
    let longest = "x".repeat(MAX_REQUEST - "MSG ".len());
    assert_eq!(client.entered(&longest), Ok(true));
    assert_eq!(client.entered(&(longest + "x")), Ok(false));
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().count(), 1);
    assert!(client.screen.errors.contains("1 bytes too long"));
}

// The keys

fn keys(bytes: &[u8]) -> Vec<Key> {
    let mut keys = Keys::default();
    keys.add(bytes);
    std::iter::from_fn(|| keys.next()).collect()
}

#[test]
fn keys_cut_into_pieces_are_recognised() {
    let typed =
        "aé日👍\r\n\t\x7f\x1b[A\x1bOB\x1b[3~\x1b[1;5C\x1bq\x1b[200~b\x03\x1b[A\x1b[201~\x03";
    let whole = keys(typed.as_bytes());
    use Key::*;
    let expected = [
        Character('a'),
        Character('é'),
        Character('日'),
        Character('👍'),
        Enter,
        Enter,
        Tab,
        Erase(Place::Left),
        Up,
        Down,
        Erase(Place::Right),
        Move(Place::WordRight),
        Unknown,
        Paste("b\x03\x1b[A".to_owned()),
        Interrupt,
    ];
    assert_eq!(whole, expected);
    let mut one_by_one = Keys::default();
    let mut found = Vec::new();
    for byte in typed.as_bytes() {
        one_by_one.add(&[*byte]);
        found.extend(std::iter::from_fn(|| one_by_one.next()));
    }
    assert_eq!(found, expected);
}

#[test]
fn a_paste_is_searched_for_its_end_only_once() {
    let mut keys = Keys::default();
    keys.add(PASTE_BEGINS);
    for _ in 0..100 {
        keys.add(&[b'x'; 4096]);
        assert_eq!(keys.next(), None);
        assert_eq!(keys.pending.len() - keys.searched, PASTE_ENDS.len());
    }
    // The end may come in pieces too.
    for byte in &PASTE_ENDS[..5] {
        keys.add(&[*byte]);
        assert_eq!(keys.next(), None);
    }
    keys.add(b"~a");
    assert_eq!(keys.next(), Some(Key::Paste("x".repeat(100 * 4096))));
    assert_eq!(keys.next(), Some(Key::Character('a')));
}

#[test]
fn key_sequences_of_other_terminals_are_consumed_exactly() {
    use Key::*;
    let a = || Character('a');
    for (bytes, expected) in [
        // F1 of the console; what Shift adds in rxvt; End of PuTTY as rxvt.
        ("\x1b[[Aa", vec![Unknown, a()]),
        ("\x1b[7$a", vec![Unknown, a()]),
        ("\x1b[Owa", vec![Move(Place::End), a()]),
        ("\x1b\x1b[Da", vec![Unknown, Move(Place::Left), a()]),
        ("\x1bOca\x1bOd", vec![Move(Place::WordRight), a(), Move(Place::WordLeft)]),
        ("\x1b[1;5D\x1b[1;3C", vec![Move(Place::WordLeft), Move(Place::WordRight)]),
        ("\x1bb\x1bf", vec![Move(Place::WordLeft), Move(Place::WordRight)]),
        ("\x1bd\x1b\x7f", vec![Erase(Place::WordRight), Erase(Place::WordLeft)]),
    ] {
        assert_eq!(keys(bytes.as_bytes()), expected, "{bytes:?}");
    }
}

#[test]
fn meaningless_bytes_delay_no_key() {
    assert_eq!(keys(b"\xffa"), [Key::Unknown, Key::Character('a')]);
    assert_eq!(keys(b"ol\xe1 a")[2..], [Key::Unknown, Key::Character(' '), Key::Character('a')]);
    assert_eq!(keys(b"\xe6\x97a"), [Key::Unknown, Key::Character('a')]);
    assert_eq!(keys(b"\xf0\x9f\x91"), []);
    let mut endless = [b"\x1b[".to_vec(), b"1".repeat(MAX_SEQUENCE)].concat();
    assert_eq!(keys(&endless), []);
    endless.push(b'1');
    assert_eq!(keys(&endless), [Key::Unknown]);
}

// The editor

/// The editor's line, with `|` for the cursor.
fn line_of(editor: &Editor) -> String {
    let (before, after) = editor.line.split_at(editor.cursor);
    format!("{before}|{after}")
}

fn typed(bytes: &str) -> Editor {
    let mut editor = Editor::default();
    press(&mut editor, bytes, &[]);
    editor
}

fn press(editor: &mut Editor, bytes: &str, names: &[&str]) {
    for key in keys(bytes.as_bytes()) {
        match editor.press(key) {
            Some(Key::Enter) => {
                let line = editor.enter();
                editor.remember(&line);
            }
            Some(Key::Tab) => editor.complete(names, 1),
            Some(Key::ShiftTab) => editor.complete(names, -1),
            _ => {}
        }
    }
}

#[test]
fn the_line_is_edited_as_in_a_shell() {
    for (keys, expected) in [
        ("hello", "hello|"),
        ("hello\x01", "|hello"),
        ("hello\x01\x05", "hello|"),
        ("hello\x1b[D\x1b[Dy", "hely|lo"),
        ("hello\x1b[D\x1b[C\x1b[C!", "hello!|"),
        ("hello\x1b[D\x7f", "hel|o"),
        ("\x7fhello\x01\x7f\x1b[3~", "|ello"),
        ("hello\x1b[3~\x04", "hello|"),
        ("hello\x02\x04", "hell|"),
        ("hello world\x01\x06\x06\x0b", "he|"),
        ("hello world\x02\x15", "|d"),
        ("one two  \x17", "one |"),
        ("one\u{3000}two\x17\x17\x17", "|"),
        ("mãe\x1b[D\x7f", "m|e"),
        ("日本\x02\x02語", "語|日本"),
        // By words, of letters and digits with their accents.
        ("one, two.\x1bb!", "one, !|two."),
        ("one, two.\x01\x1bf!", "one!|, two."),
        ("one, two.\x01\x1b[1;5C\x1b[1;5C\x1bf!", "one, two.!|"),
        ("one, e\u{301}t.\x1b[1;5D!", "one, !|e\u{301}t."),
        ("one, two.\x1b\x7f", "one, |"),
        ("one, two.\x01\x1bd", "|, two."),
        // Ctrl-Y inserts the erased text at the cursor.
        ("one two\x17\x01\x19", "two|one "),
        ("one two\x01\x0b\x19\x19", "one twoone two|"),
        ("one\x03\x19", "one|"),
        // Ctrl-W twice, then Ctrl-Y; erasing forwards; a key between them.
        ("one two three\x17\x17\x19", "one two three|"),
        ("one two three\x01\x1bd\x1bd\x05\x19", " threeone two|"),
        ("one two\x17\x02\x17\x05\x19", " one|"),
        // Ctrl-_ undoes a typed word, or one key that erased.
        ("one two\x1f", "one |"),
        ("one two\x1f\x1f\x1f\x1f", "|"),
        ("one two\x17\x17\x1f", "one |"),
        ("one\x03\x1f", "one|"),
        ("ab\x1fc\x1f", "|"),
        // Accents, skin tones, joined emoji and flags are one character.
        ("ae\u{301}\x7f", "a|"),
        ("a👍🏽\x1b[D", "a|👍🏽"),
        ("👩\u{200d}👧\x02", "|👩\u{200d}👧"),
        ("🇵🇹🇧🇷\x7f", "🇵🇹|"),
        ("🇵🇹🇧🇷\x02\x02\x06", "🇵🇹|🇧🇷"),
        ("a\x1b[200~\tb\x03\x1b[201~c", "a\tbc|"),
        ("a\x1b[200~\r \n\x1b[201~b", "ab|"),
        ("a\u{202e}\u{85}b", "ab|"),
    ] {
        assert_eq!(line_of(&typed(keys)), expected, "{keys:?}");
    }
}

#[test]
fn arrow_keys_bring_back_sent_lines() {
    let mut editor = typed("one\rtwo\rtwo\rdraft");
    for (keys, expected) in [
        ("\x1b[B", "draft|"),
        ("\x1b[A", "two|"),
        ("\x10", "one|"),
        ("\x1b[A", "one|"),
        ("!\x1b[B", "two|"),
        ("\x0e", "draft|"),
        ("\x1b[A\x1b[A\r\x1b[A", "one|"),
        // A line that was not sent stays too.
        ("\x1b[A", "draft|"),
    ] {
        press(&mut editor, keys, &[]);
        assert_eq!(line_of(&editor), expected, "{keys:?}");
    }
}

#[test]
fn ctrl_r_searches_sent_lines() {
    let mut editor = typed("one\rtwo\rthree\rhalf");
    for (keys, expected) in [
        ("\x12o", "two|"),
        ("\x12", "one|"),
        // No older line fits, so this one stays, and more letters still find it.
        ("\x12", "one|"),
        ("n", "one|"),
        ("\x7f\x7ft", "three|"),
        // Another key accepts the line; the arrows go on from there.
        ("\x01!", "!|three"),
        ("\x1b[A", "two|"),
        ("\x1b[B\x1b[B", "half|"),
        ("\x12one\x03", "half|"),
        ("\x12one\x1b[Z", "one|"),
    ] {
        press(&mut editor, keys, &[]);
        assert_eq!(line_of(&editor), expected, "{keys:?}");
    }
}

#[test]
fn history_holds_neither_names_nor_empty_lines() {
    let (mut client, _sent) = greeted(None, terminal(80));
    type_in(&mut client, "ana\r");
    client.arrived("WELCOME ana 1").unwrap();
    type_in(&mut client, "hello\r\r\x1b[A");
    assert_eq!(line_being_typed(&client), "hello");
    type_in(&mut client, "\x1b[A");
    assert_eq!(line_being_typed(&client), "hello");
}

#[test]
fn names_are_completed_in_turn() {
    let names = ["bob", "Bert", "Érica", "ana", "Åse"];
    for (keys, expected) in [
        ("@b\t", "@bob |"),
        ("@b\t\t", "@Bert |"),
        ("@b\t\t\t", "@bob |"),
        ("/BE\t", "/Bert |"),
        ("@\t\t\t\t", "@ana |"),
        ("@x\t", "@x|"),
        ("b\t", "bob: |"),
        ("b\t\x1b[Z", "Bert: |"),
        ("b\t\t\t\x1b[Z", "Bert: |"),
        ("b\x1b[Z", "Bert: |"),
        // Names with the exact prefix come before names that match without accents.
        ("é\t", "Érica: |"),
        ("A\t", "ana: |"),
        ("å\t", "Åse: |"),
        ("a\t\t", "Åse: |"),
        ("/li\t", "/list |"),
        ("hi (bo\t)", "hi (bob)|"),
        ("@bob an\t", "@bob ana|"),
        ("hi an\t\t", "hi ana|"),
        ("hi @e\t, you", "hi @Érica, you|"),
        ("E\u{301}r\t", "Érica: |"),
        ("hi\x01@b\t", "@bob |hi"),
        ("@b\t \t", "@bob  bob|"),
        ("@bob\x01\t", "bob: |@bob"),
        ("\t", "@bob |"),
        ("\t\t", "@Bert |"),
    ] {
        let mut editor = Editor::default();
        press(&mut editor, keys, &names);
        assert_eq!(line_of(&editor), expected, "{keys:?}");
    }
}

#[test]
fn the_latest_speakers_come_first() {
    let (mut client, _sent) = welcomed(terminal(80));
    for line in ["USERS 4 ana bea bob bert", "MSG bob hi", "MSG bert hi", "MSG eve hi"] {
        client.arrived(line).unwrap();
    }
    for expected in ["bert: ", "bob: ", "bea: ", "bert: "] {
        let keys = if line_being_typed(&client).is_empty() { "b\t" } else { "\t" };
        type_in(&mut client, keys);
        assert_eq!(line_being_typed(&client), expected);
    }
    (0..=MAX_SPEAKERS).for_each(|number| client.roster.spoke(&number.to_string()));
    assert_eq!(client.roster.speakers.len(), MAX_SPEAKERS);
}

#[test]
fn names_are_found_without_their_accents() {
    for (name, plain) in [
        ("ÀÁÂÃÄÅ", "aaaaaa"),
        ("Ç", "c"),
        ("ÈÉÊË", "eeee"),
        ("ÌÍÎÏ", "iiii"),
        ("Ñ", "n"),
        ("ÒÓÔÕÖ", "ooooo"),
        ("ÙÚÛÜ", "uuuu"),
        ("C\u{327}", "c"),
    ] {
        let mut editor = Editor::default();
        press(&mut editor, &format!("@{plain}\t"), &[name]);
        assert_eq!(line_of(&editor), format!("@{name} |"));
    }
}

#[test]
fn tab_on_an_empty_line_answers_the_last_private_message() {
    let (mut client, _sent) = welcomed(terminal(80));
    client.arrived("USERS 3 ana bob eve").unwrap();
    type_in(&mut client, "\t");
    assert_eq!(line_being_typed(&client), "");
    type_in(&mut client, "a\t");
    assert_eq!(line_being_typed(&client), "a");
    client.arrived("PRIV eve psst").unwrap();
    type_in(&mut client, "\x15\t");
    assert_eq!(line_being_typed(&client), "@eve ");
    client.arrived("LEFT eve 2 quit").unwrap();
    type_in(&mut client, "\x15\t");
    assert_eq!(line_being_typed(&client), "");
}

#[test]
fn a_paste_of_several_lines_is_text_and_needs_a_yes() {
    let (mut client, sent) = welcomed(terminal(80));
    type_in(&mut client, "x\x1b[200~/quit\r@bob hi\n\n\x03/etc/passwd:root\x1b[201~");
    assert_eq!(client.prompt(), "Paste 3 lines? Enter: yes, Ctrl-C: no ");
    // Other keys neither send nor drop the paste.
    type_in(&mut client, "y\t\r");
    client.send_waiting().unwrap();
    let lines: Vec<_> = sent.try_iter().collect();
    let expected =
        ["MSG /quit\nPING 1\n", "MSG @bob hi\nPING 2\n", "MSG /etc/passwd:root\nPING 3\n"];
    assert_eq!(lines, expected);
    assert_eq!(line_being_typed(&client), "x");
    type_in(&mut client, "\x1b[200~1\r2\x1b[201~\x03\r");
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["MSG x\nPING 4\n"]);
}

#[test]
fn a_long_line_is_shown_around_the_cursor() {
    let shown = |keys: &str, columns| {
        // The cursor takes a column.
        let (before, after) = typed(keys).view(columns + 1);
        assert!(width_of(&before) <= columns, "{before}|{after}");
        assert!(width_of(&before) + width_of(&after) <= columns + 1, "{before}|{after}");
        format!("{before}|{after}")
    };
    assert_eq!(shown("0123456789", 10), "0123456789|");
    assert_eq!(shown("0123456789a", 10), "<6789a|");
    assert_eq!(shown("0123456789abcde", 10), "<6789abcde|");
    assert_eq!(shown("0123456789abcdef", 10), "<bcdef|");
    assert_eq!(shown("0123456789abcdef\x02\x02", 10), "<6789abcd|ef");
    assert_eq!(shown("0123456789abcdefghij\x02\x02\x02\x02\x02\x02", 10), "<6789abcd|e>");
    assert_eq!(shown("0123456789a\x01", 10), "|0123456789a");
    assert_eq!(shown("0123456789abc\x01", 10), "|0123456789>");
    assert_eq!(shown("日本語日本語", 5), "<|");
    assert_eq!(shown("日本語日本語\x01", 5), "|日本>");
    // A narrow window has no space for marks.
    assert_eq!(shown("abcdef\x02", 3), "cde|f");
    assert_eq!(shown("ab", 1), "b|");
    assert_eq!(shown("abc", 0), "|");
}

#[test]
fn characters_are_as_wide_as_terminals_make_them() {
    for (text, columns) in [
        ("abc", 3),
        ("mãe", 3),
        ("e\u{301}", 1),
        ("日本語", 6),
        ("ｱ", 1),
        ("한", 2),
        ("👍", 2),
        ("…", 1),
        ("→│─", 3),
        // Marks of Hebrew, Arabic, Hindi, Thai and Japanese, one that encloses, and those of emoji.
        ("ש\u{5b8}", 1),
        ("ب\u{64e}", 1),
        ("क\u{941}\u{902}", 1),
        ("ก\u{e35}\u{e48}", 1),
        ("か\u{3099}", 2),
        ("a\u{20dd}", 1),
        ("⚽\u{fe0f}\u{200d}", 2),
        ("ᄀ⌚⭐", 6),
        ("︰、Ａ", 6),
        ("𠀀", 2),
    ] {
        assert_eq!(width_of(text), columns, "{text}");
    }
}

// The screen

#[test]
fn all_rows_except_the_first_are_indented() {
    for (line, columns, expected) in [
        ("one two", 10, "one two\n"),
        ("0123456789", 10, "0123456789\n"),
        ("one two three four", 10, "one two\n  three\n  four\n"),
        ("0123456789abcdefghij", 10, "0123456789\n  abcdefgh\n  ij\n"),
        ("hi 0123456789abcdef", 10, "hi\n  01234567\n  89abcdef\n"),
        ("a 012345678", 10, "a\n  01234567\n  8\n"),
        ("ana:          eve: hi", 10, "ana:\n  eve: hi\n"),
        ("one two 34 five", 10, "one two 34\n  five\n"),
        ("one two  \tx", 8, "one two\n  x\n"),
        ("日本語日本語", 9, "日本語日\n  本語\n"),
        ("a\tb", 20, "a    b\n"),
        ("abc", 1, "a\nb\nc\n"),
        ("日本", 1, "\n日\n本\n"),
        // A wide URL is left to the terminal to fold; one that fits is a word like others.
        ("bob: see http://0123456789 ok", 10, "bob: see http://0123456789 ok\n"),
        ("bob: see http://0123456789ab ok", 10, "bob: see http://0123456789ab\n  ok\n"),
        ("https://0123456789 a", 10, "https://0123456789 a\n"),
        ("see http://ab ok", 12, "see\n   http://ab\n   ok\n"),
        ("\x1b[1mone two three\x1b[0m x", 10, "\x1b[1mone two\n  three\x1b[0m x\n"),
    ] {
        assert_eq!(wrap(line, columns), expected, "{line:?}");
    }
}

/// The terminal is asked for the cursor's position only if the cursor stood beyond the new edge.
#[test]
fn a_resize_erases_a_folded_line_and_keeps_messages_above_a_cut_one() {
    // Columns of the line with its prompt, of the narrower window; the answer; rows to go up.
    for (typed, columns, answer, rows) in [
        (68, 60, 11, Some(1)),
        (68, 30, 11, Some(2)),
        // xterm leaves the cursor at the edge.
        (68, 60, 60, None),
        // Nothing is known of this one.
        (68, 60, 5, None),
    ] {
        let (mut client, _sent) = welcomed(terminal(80));
        type_in(&mut client, &"x".repeat(typed));
        let prompt = client.prompt();
        client.screen.draw(&prompt);
        client.screen.resize(columns);
        assert_eq!(client.screen.control, ASK_POSITION);
        client.screen.control.clear();
        type_in(&mut client, &format!("\x1b[7;{answer}R"));
        let up = rows.map(|rows| format!("\x1b[{rows}A"));
        assert_eq!(client.screen.control, up.unwrap_or_default(), "{columns}, {answer}");
        assert_eq!(client.screen.asked, None);
    }
    let (mut client, _sent) = welcomed(terminal(80));
    type_in(&mut client, "half a line");
    client.screen.draw("> ");
    client.screen.resize(60);
    // The key F3 with Shift looks like an answer.
    type_in(&mut client, "\x1b[1;2R");
    assert_eq!(client.screen.control, "");
}

#[test]
fn a_terminal_that_does_not_report_the_position_times_out() {
    let (mut client, _sent) = welcomed(terminal(80));
    type_in(&mut client, &"x".repeat(70));
    client.screen.draw("> ");
    client.screen.resize(30);
    assert!(client.wake_up() <= Instant::now() + POSITION_TIMEOUT);
    client.time_passed(client.wake_up()).unwrap();
    assert_eq!(client.screen.asked, None);
}

#[test]
fn clearing_the_screen_keeps_pending_lines() {
    let (mut client, _sent) = welcomed(terminal(80));
    client.arrived("MSG bob one").unwrap();
    type_in(&mut client, "\x0c");
    assert!(client.screen.pending.starts_with(CLEAR));
    assert!(client.screen.pending.contains("bob: one\n"));
}

#[test]
fn a_wide_prompt_disappears_while_the_user_types() {
    let mut input = terminal(20);
    assert!(input.draw("connecting to host ").contains("connecting to host "));
    input.editor.insert("hi");
    assert!(!input.draw("connecting to host ").contains("connecting"));
    let narrow = " ".repeat(20 - MIN_TO_TYPE);
    assert!(input.draw(&narrow).contains(&narrow));
    assert!(!input.draw(&(narrow + ".")).contains('.'));
}

#[test]
fn names_have_colours_and_messages_for_the_user_are_bold() {
    let coloured = Screen { has_colours: true, ..terminal(80) };
    assert_eq!(coloured.name("ana"), coloured.name("ana"));
    let code = |name| coloured.name(name).split('m').next().map(str::to_owned);
    assert_eq!(code("ana"), code("Ana"));
    assert_ne!(code("ana"), code("bob"));
    assert!(coloured.name("ana").ends_with("mana\x1b[0m"));
    assert_eq!(plain().name("ana"), "ana");
    let (mut client, _sent) = welcomed(coloured);
    let lines = ["PRIV bob psst", "MSG bob hi Ana", "LEFT bob 1 quit", "ERR bad-text no"];
    lines.into_iter().for_each(|line| client.arrived(line).unwrap());
    assert!(client.screen.pending.contains("\x1b[1m[private] bob: psst\x1b[0m\n"));
    assert!(client.screen.pending.contains(": \x1b[1mhi Ana\x1b[0m\n"));
    assert!(client.screen.pending.contains("\x1b[2mbob left the chat. (1 online)\x1b[0m\n"));
    assert!(client.screen.pending.contains(&format!("\x1b[{RED}mError: ")));
    // Without colours, what is for us still stands out.
    let (mut client, _sent) = welcomed(terminal(80));
    lines.into_iter().for_each(|line| client.arrived(line).unwrap());
    assert!(client.screen.pending.contains("\x1b[1m[private] bob: psst\x1b[0m\n"));
    assert!(client.screen.pending.contains("bob: \x1b[1mhi Ana\x1b[0m\n"));
    assert!(client.screen.pending.contains("\nError: "));
}

#[test]
fn events_show_times() {
    let shown = |shows_time| {
        let screen = Screen { shows_time, ..terminal(80) };
        let (mut client, _sent) = welcomed(screen);
        client.screen.pending.clear();
        client.arrived("MSG bob hi").unwrap();
        client.screen.pending
    };
    let digits = |c: char| if c.is_ascii_digit() { '0' } else { c };
    let with_time: String = shown(true).chars().map(digits).collect();
    assert_eq!(with_time, "\x1b[0m00:00\x1b[0m bob: hi\n");
    assert_eq!(shown(false), "bob: hi\n");
}

#[test]
fn nothing_unprintable_is_shown() {
    assert_eq!(printable("tab\tmãe 👍".as_bytes()), "tab\tmãe 👍");
    assert_eq!(printable(b"\x1b[2J\x07\xff"), "\\u{1b}[2J\\u{7}\u{fffd}");
    assert_eq!(printable("\u{9b}\u{2028}\u{202e}\u{2066}".as_bytes()), {
        "\\u{9b}\\u{2028}\\u{202e}\\u{2066}"
    });
}

#[test]
fn the_bell_rings_for_private_messages_and_mentions() {
    let rings = |line: &str| {
        let (mut client, _sent) = welcomed(plain());
        client.arrived(line).unwrap();
        client.screen.pending.contains('\x07')
    };
    assert!(rings("PRIV bob hi"));
    assert!(rings("MSG bob hi Ana, there?"));
    assert!(rings("MSG bob I mean ana."));
    assert!(rings("MSG bob anã!"));
    assert!(!rings("MSG bob hi anabel and banana"));
    assert!(!rings("MSG ana.b hello"));
    assert!(!rings("JOINED ana2 3"));
}

// The terminal

/// Returns one of these results for each read; a further read is a bug.
struct Keyboard(VecDeque<io::Result<&'static str>>);

impl Read for Keyboard {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let typed = self.0.pop_front().expect("the end has been read")?;
        bytes[..typed.len()].copy_from_slice(typed.as_bytes());
        Ok(typed.len())
    }
}

/// Returns the pieces that the main thread receives.
fn heard<const N: usize>(is_terminal: bool, reads: [io::Result<&'static str>; N]) -> Vec<String> {
    let (keyboard, typed) = mpsc::sync_channel(8);
    let (events, happened) = mpsc::sync_channel(8);
    let input = BufReader::new(Keyboard(VecDeque::from(reads)));
    read_input(input, is_terminal, &keyboard, &events);
    let heard: Vec<_> = typed.try_iter().map(|bytes| String::from_utf8(bytes).unwrap()).collect();
    assert_eq!(happened.try_iter().count(), heard.len());
    heard
}

#[test]
fn input_ends_at_its_end_or_with_the_terminal() {
    assert_eq!(heard(false, [Ok("one\ntw"), Ok("o\n"), Ok("")]), ["one\n", "two\n", ""]);
    assert_eq!(heard(false, [Ok("one\ntw"), Ok("o"), Ok("")]), ["one\n", "two"]);
    assert_eq!(heard(true, [Ok("on"), Ok("e\rtwo"), Ok("")]), ["on", "e\rtwo", ""]);
    let (interrupted, gone) = (ErrorKind::Interrupted.into(), io::Error::other("gone"));
    assert_eq!(heard(true, [Err(interrupted), Ok("a"), Err(gone)]), ["a", ""]);
}

#[test]
#[cfg(unix)]
fn a_terminal_of_unknown_size_has_80_columns() {
    for (size, columns) in [("24 132", 132), ("24 1", 1), ("0 0", 80), ("24", 80), ("", 80)] {
        assert_eq!(terminal::columns_of(size), columns, "{size:?}");
    }
}

// The texts

#[test]
fn both_languages_say_the_same() {
    for text in [
        text::YOUR_NAME_OR,
        text::CONNECTING,
        text::UNCONFIRMED,
        text::PASTE,
        text::WELCOME,
        text::PRIVATE,
        text::PRIVATE_TO,
        text::ONLINE,
        text::USERS,
        text::NO_SUCH_COMMAND,
        text::NOTHING_SAID,
        text::TAKES_NOTHING,
        text::CANNOT_CONNECT,
        text::LOST,
        text::CLOSED_BY,
        text::NAME_REFUSED,
        text::TOO_LONG,
        text::USAGE,
    ] {
        let [english, portuguese] = text;
        assert_eq!(english.matches("{}").count(), portuguese.matches("{}").count(), "{text:?}");
    }
    assert_eq!(say(text::JOINED, &["a{}b"]), "a{}b joined the chat.");
    for line in [text::HELP, text::USAGE].into_iter().flatten().flat_map(str::lines) {
        assert!(width_of(line) <= 80, "{line}");
    }
}

#[test]
fn readme_shows_what_a_transcript_plays_and_every_option() {
    let readme = include_str!("../../README.md");
    let transcript = include_str!("../transcripts/terminal-line-survives-what-arrives.txt");
    let sample = readme.split("```").find(|it| it.contains("Welcome, ana!")).expect("a sample");
    for line in sample.trim().lines() {
        let step = match line.split_at_checked("00:00 ".len()) {
            Some((time, rest)) if time.get(2..3) == Some(":") => format!("ana sees \"*:* {rest}\""),
            _ if line.starts_with('>') => format!("ana shows \"{}\"", line.replace('█', "|")),
            _ => format!("ana sees \"{line}\""),
        };
        assert!(transcript.lines().any(|it| it == step), "{step}");
    }
    let [english, portuguese] = text::USAGE;
    let options = |text: &'static str| text.lines().filter_map(|it| it.trim().strip_prefix("--"));
    let names = |text| options(text).filter_map(|it| it.split(' ').next()).collect::<Vec<_>>();
    assert_eq!(names(english), names(portuguese));
    for name in names(english).iter().filter(|name| !matches!(**name, "help" | "version")) {
        assert!(readme.contains(&format!("| `--{name}")), "{name}");
    }
}

#[test]
fn every_error_code_of_the_protocol_is_translated() {
    // The codes of PROTOCOL.md, "Errors".
    for code in "usage unknown-command not-named already-named bad-name name-taken no-such-user \
                 bad-text line-too-long full timeout"
        .split_whitespace()
    {
        assert!(!explain_code(code, "the server's own").contains("server's own"), "{code}");
    }
    assert_eq!(explain_code("future", "the server's own"), "\"the server's own\"");
    assert_eq!(explain_code("future", ""), "\"future\"");
}

#[test]
fn common_system_errors_are_translated() {
    for (kind, words) in [
        (ErrorKind::ConnectionRefused, "connection refused; is the server running?"),
        (ErrorKind::TimedOut, "no answer"),
        (ErrorKind::ConnectionReset, "it closed the connection"),
        (ErrorKind::ConnectionAborted, "it closed the connection"),
    ] {
        assert_eq!(explain(&kind.into()), words);
    }
    assert_eq!(explain(&io::Error::other("out of string")), "\"out of string\"");
}

// The conversation

#[test]
fn a_silent_server_gets_a_ping_and_then_times_out() {
    let (mut client, sent) = welcomed(plain());
    client.time_passed(client.heartbeat).unwrap();
    assert_eq!(sent.try_recv().unwrap(), "PING 1\n");
    client.handle(Event::Server(1, News::Line("PONG 1".to_owned()))).unwrap();
    client.time_passed(client.heartbeat).unwrap();
    assert_eq!(sent.try_recv().unwrap(), "PING 2\n");
    let lost = "lost the server at host:9999: it stopped answering".to_owned();
    assert_eq!(client.time_passed(client.due.unwrap()), Err(End::Failed(lost)));
}

#[test]
fn no_ping_is_sent_while_connecting() {
    let (mut client, sent) = connected(None, plain());
    client.stage = Stage::Connecting;
    for _ in 0..3 {
        client.time_passed(client.heartbeat).unwrap();
    }
    assert_eq!(sent.try_iter().count(), 0);
}

#[test]
fn a_suspended_client_does_not_time_out_its_server() {
    let (mut client, sent) = welcomed(plain());
    let long_after = client.heartbeat + 2 * REPLY_TIMEOUT;
    client.time_passed(long_after).unwrap();
    assert_eq!(sent.try_recv().unwrap(), "PING 1\n");
    // Asked already, then suspended: the server gets time again.
    let long_after = client.due.unwrap() + PAUSE;
    client.time_passed(long_after).unwrap();
    assert_eq!(client.due, Some(long_after + TIMEOUT));
    assert!(client.time_passed(client.due.unwrap()).is_err());
}

#[test]
fn a_missing_bye_times_out() {
    let (mut client, sent) = greeted(None, plain());
    client.typed(&[]).unwrap();
    client.send_waiting().unwrap();
    assert_eq!(sent.try_recv().unwrap(), "QUIT\n");
    assert!(client.time_passed(client.due.unwrap()).is_err());
}

#[test]
fn the_prompt_shows_the_stage_and_unconfirmed_lines() {
    let (mut client, _sent) = connected(None, terminal(80));
    client.stage = Stage::Connecting;
    assert_eq!(client.prompt(), "connecting to host:9999 … ");
    client.handle(Event::Server(1, News::Connected)).unwrap();
    client.offer = Some("ana".to_owned());
    client.arrived("HELLO linechat/1").unwrap();
    assert_eq!(client.prompt(), "Your name [ana]: ");
    type_in(&mut client, "\r");
    client.arrived("WELCOME ana 1").unwrap();
    type_in(&mut client, "one\rtwo\r");
    client.send_waiting().unwrap();
    assert_eq!(client.prompt(), "> ");
    assert!(client.wake_up() <= Instant::now() + SLOW);
    client.unconfirmed.iter_mut().for_each(|sent| sent.since -= SLOW);
    assert_eq!(client.prompt(), "(2 unconfirmed) > ");
    client.arrived("PONG 2").unwrap();
    assert_eq!(client.prompt(), "> ");
    client.time_passed(client.heartbeat).unwrap();
    client.unconfirmed[0].since -= SLOW;
    assert_eq!(client.prompt(), "(1 unconfirmed) > ");
    type_in(&mut client, "\x04");
    client.send_waiting().unwrap();
    assert_eq!(client.prompt(), "leaving … ");
}

#[test]
fn ctrl_c_leaves_at_once_while_connecting() {
    let (mut client, _sent) = connected(None, terminal(80));
    assert_eq!(client.typed(b"\x03"), Err(End::Left));
}

#[test]
fn ctrl_c_clears_the_line_and_leaves_when_pressed_twice() {
    let (mut client, sent) = welcomed(terminal(80));
    type_in(&mut client, "half a line\x03");
    assert_eq!(line_being_typed(&client), "");
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().count(), 0);
    type_in(&mut client, "\x03");
    assert!(client.screen.pending.contains("Ctrl-C again, or Ctrl-D, leaves."));
    // Too late, so it counts as the first again.
    client.interrupted = client.interrupted.map(|at| at - CONFIRM_TIME);
    type_in(&mut client, "\x03");
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().count(), 0);
    type_in(&mut client, "\x03");
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["QUIT\n"]);
    assert!(client.typed(b"\x03").is_err());
}

// A connection that is lost

/// A client in the room at a terminal, and what it writes to each of its connections; the first is
/// not among them.
fn member() -> (Client, Receiver<Receiver<String>>) {
    let (mut client, connections) = connecting(Some("ana"), terminal(80));
    client.arrived("HELLO linechat/1").unwrap();
    client.arrived("WELCOME ana 2").unwrap();
    drop(connections.recv());
    (client, connections)
}

fn news(client: &mut Client, news: News) -> Result<(), End> {
    client.handle(Event::Server(client.attempt, news))
}

/// The seconds until the next attempt, from now.
fn delay(client: &Client) -> u64 {
    let due = client.due.unwrap().saturating_duration_since(Instant::now());
    due.as_secs_f64().round() as u64
}

#[test]
fn reconnecting_backs_off_to_half_a_minute() {
    let (mut client, connections) = member();
    type_in(&mut client, "half a line");
    for expected in [0, 1, 2, 4, 8, 15, 30, 30, 30] {
        assert_eq!(news(&mut client, News::Lost("gone".to_owned())), Ok(()));
        assert_eq!((client.stage, delay(&client)), (Stage::Waiting, expected));
        assert!(connections.try_recv().is_err());
        client.time_passed(client.due.unwrap()).unwrap();
        assert_eq!(client.stage, Stage::Connecting);
        connections.try_recv().expect("an attempt");
    }
    assert_eq!(client.prompt(), "(not connected, attempt 9) > ");
    assert_eq!(line_being_typed(&client), "half a line");
    // The attempts are in the prompt alone.
    let lost = "lost the server at host:9999: gone; trying again";
    assert_eq!(client.screen.pending.matches(lost).count(), 1);
    assert_eq!(client.screen.pending.matches("gone").count(), 1);
}

#[test]
fn reconnecting_keeps_the_name_and_resends_nothing() {
    let (mut client, connections) = member();
    for line in ["one", "two", "half"] {
        type_in(&mut client, line);
        client.send_waiting().unwrap();
        if line != "half" {
            type_in(&mut client, "\r");
        }
    }
    client.send_waiting().unwrap();
    client.arrived("PONG 1").unwrap();
    client.arrived("BYE server stops").unwrap();
    assert!(client.screen.pending.contains("perhaps not sent: two\n"));
    assert!(!client.screen.pending.contains("perhaps not sent: one\n"));
    client.time_passed(client.due.unwrap()).unwrap();
    let sent = connections.recv().unwrap();
    news(&mut client, News::Connected).unwrap();
    // What can be said now stays in the editor.
    type_in(&mut client, "\r");
    assert_eq!(line_being_typed(&client), "half");
    for line in ["HELLO linechat/1", "WELCOME ana 2", "USERS 2 ana bob"] {
        news(&mut client, News::Line(line.to_owned())).unwrap();
    }
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["NAME ana\n"]);
    assert!(client.screen.pending.contains("Connected again, ana."));
    assert_eq!(client.prompt(), "> ");
    type_in(&mut client, "\x15\x1b[A");
    assert_eq!(line_being_typed(&client), "two");
}

#[test]
fn news_of_an_old_connection_is_ignored() {
    let (mut client, _connections) = member();
    client.handle(Event::Server(1, News::Lost("gone".to_owned()))).unwrap();
    client.time_passed(client.due.unwrap()).unwrap();
    for old in [News::Connected, News::Line("BYE".to_owned()), News::Lost("late".to_owned())] {
        client.handle(Event::Server(1, old)).unwrap();
        assert_eq!(client.stage, Stage::Connecting);
    }
}

#[test]
fn name_taken_by_the_lost_connection_is_retried_for_two_minutes() {
    let (mut client, _connections) = member();
    news(&mut client, News::Lost("gone".to_owned())).unwrap();
    for is_over in [false, false, true] {
        client.time_passed(client.due.unwrap()).unwrap();
        news(&mut client, News::Connected).unwrap();
        client.arrived("HELLO linechat/1").unwrap();
        if is_over {
            client.membership.as_mut().unwrap().lost -= GHOST;
        }
        client.arrived("ERR name-taken taken").unwrap();
        assert_eq!(client.stage, if is_over { Stage::Asking } else { Stage::Waiting });
        assert_eq!(client.screen.pending.contains("the name 'ana' was refused"), is_over);
    }
    assert_eq!(client.prompt(), "Your name: ");
}

#[test]
fn an_unstable_connection_does_not_reset_the_back_off() {
    let (mut client, _connections) = member();
    for (expected, is_stable) in [(0, false), (1, false), (2, false), (0, true), (1, false)] {
        if is_stable {
            client.membership.as_mut().unwrap().lost -= STABLE;
        }
        news(&mut client, News::Lost("gone".to_owned())).unwrap();
        assert_eq!(delay(&client), expected);
        client.time_passed(client.due.unwrap()).unwrap();
        for line in ["HELLO linechat/1", "WELCOME ana 2"] {
            client.stage = if line.starts_with('H') { Stage::Greeting } else { client.stage };
            client.arrived(line).unwrap();
        }
    }
}

#[test]
fn the_user_can_leave_while_not_connected() {
    for keys in ["\x04", "/quit\r", "\x03\x03"] {
        let (mut client, _connections) = member();
        news(&mut client, News::Lost("gone".to_owned())).unwrap();
        assert_eq!(client.typed(keys.as_bytes()), Err(End::Left), "{keys:?}");
    }
}

#[test]
fn without_a_terminal_or_with_no_reconnect_a_loss_is_the_end() {
    let (mut client, _sent) = welcomed(plain());
    assert!(news(&mut client, News::Lost("gone".to_owned())).is_err());
    let (mut client, _connections) = member();
    client.options.no_reconnect = true;
    assert!(news(&mut client, News::Lost("gone".to_owned())).is_err());
    // A client that was never in the room has nothing to return to.
    let (mut client, _sent) = greeted(Some("ana"), terminal(80));
    assert!(news(&mut client, News::Lost("gone".to_owned())).is_err());
    // A user who leaves does not come back.
    let (mut client, _connections) = member();
    type_in(&mut client, "\x04");
    client.send_waiting().unwrap();
    assert!(news(&mut client, News::Lost("gone".to_owned())).is_err());
}

// Hostile servers

#[test]
fn lines_do_not_renew_the_time_for_bye_or_a_confirmation() {
    for is_leaving in [true, false] {
        let (mut client, _sent) = welcomed(plain());
        match is_leaving {
            true => client.typed(&[]).unwrap(),
            false => assert!(client.entered("hi").unwrap()),
        }
        client.send_waiting().unwrap();
        let due = client.due.expect("an end");
        let line = || Event::Server(1, News::Line("WEATHER sunny".to_owned()));
        client.handle(line()).unwrap();
        client.arrived("PONG 2").unwrap();
        assert_eq!(client.due, Some(due));
        assert!(client.wake_up() <= due);
        assert!(client.time_passed(due).is_err());
    }
}

#[test]
fn a_server_that_never_pauses_still_times_out() {
    let (mut client, _sent) = welcomed(plain());
    client.due = Some(Instant::now());
    let (events, happened) = mpsc::sync_channel(2);
    events.send(Event::Server(1, News::Line("WEATHER sunny".to_owned()))).unwrap();
    let (_keyboard, typed) = mpsc::sync_channel(1);
    assert!(client.turn(&happened, &typed).is_err());
}

#[test]
fn the_queue_of_lines_to_send_is_bounded() {
    let (mut client, _sent) = welcomed(plain());
    // This server confirms what it has not read.
    let outcome = (1..=2 * MAX_QUEUED).try_for_each(|number| {
        client.entered("hi")?;
        client.send_waiting()?;
        client.arrived(&format!("PONG {number}"))
    });
    assert!(outcome.is_err());
    assert!(client.requests <= MAX_QUEUED + 1);
}

#[test]
fn an_unexpected_pong_confirms_nothing() {
    let (mut client, _sent) = welcomed(plain());
    client.entered("one").unwrap();
    client.send_waiting().unwrap();
    for token in ["2", "99", "0", "x", ""] {
        client.arrived(&format!("PONG {token}")).unwrap();
        assert_eq!(client.unconfirmed.len(), 1, "{token}");
    }
    client.arrived("PONG 1").unwrap();
    assert_eq!(client.unconfirmed.len(), 0);
}

#[test]
fn unsent_and_unconfirmed_lines_are_listed() {
    let (mut client, sent) = greeted(Some("ana"), plain());
    for line in ["one", "@bob two", "/list", "three"] {
        client.entered(line).unwrap();
    }
    assert_eq!(client.unsent(false).len(), 3);
    client.arrived("WELCOME ana 1").unwrap();
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().last().unwrap(), "MSG three\nPING 4\n");
    client.arrived("PONG 1").unwrap();
    client.arrived("ERR no-such-user x").unwrap();
    client.entered("four").unwrap();
    let unsent = client.unsent(true);
    assert_eq!(unsent, ["perhaps not sent: three", "not sent: four"]);
}

#[test]
fn lines_typed_before_hello_are_the_name_and_then_messages() {
    let (mut client, sent) = connected(None, plain());
    client.entered("ana").unwrap();
    client.entered("hello").unwrap();
    client.arrived("HELLO linechat/1 hi").unwrap();
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["NAME ana\n"]);
    client.arrived("WELCOME ana 1").unwrap();
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["MSG hello\nPING 1\n"]);
}

#[test]
fn enter_alone_takes_the_offered_name() {
    let (mut client, sent) = connected(None, terminal(80));
    client.offer = Some("ana".to_owned());
    // Before the server greets, nothing is offered.
    type_in(&mut client, "\r");
    client.arrived("HELLO linechat/1 hi").unwrap();
    assert_eq!(sent.try_iter().count(), 0);
    type_in(&mut client, "\r");
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["NAME ana\n"]);
    client.arrived("ERR name-taken no").unwrap();
    type_in(&mut client, "\r \r");
    assert_eq!(sent.try_iter().count(), 0);
    type_in(&mut client, "eve\r");
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["NAME eve\n"]);
}

#[test]
fn unconfirmed_requests_are_limited() {
    let (mut client, sent) = welcomed(plain());
    (0..2 * MAX_UNCONFIRMED).for_each(|_| assert!(client.entered("hi").unwrap()));
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().count(), MAX_UNCONFIRMED);
    assert!(!client.can_take_more());
    client.arrived("PONG 2").unwrap();
    client.send_waiting().unwrap();
    assert_eq!(sent.try_iter().count(), 2);
}

#[test]
fn a_line_typed_after_quit_is_sent_before_quit() {
    let (mut client, sent) = welcomed(terminal(80));
    (0..MAX_UNCONFIRMED).for_each(|_| type_in(&mut client, "hi\r"));
    type_in(&mut client, "/quit\rlast\r");
    client.send_waiting().unwrap();
    client.arrived("PONG 2").unwrap();
    client.send_waiting().unwrap();
    let last_two: Vec<_> = sent.try_iter().skip(MAX_UNCONFIRMED).collect();
    assert_eq!(last_two, ["MSG last\nPING 65\n", "QUIT\n"]);
}

#[test]
fn the_roster_is_kept_current_and_a_newcomer_sees_it() {
    let (mut client, _sent) = welcomed(plain());
    let mut shown = |line: &str| {
        client.arrived(line).unwrap();
        (mem::take(&mut client.screen.pending), client.roster.sorted().join(" "))
    };
    let (nothing, all) = (String::new, |text: &str| text.to_owned());
    shown("USERS 3 zoe bob");
    assert_eq!(
        shown("USERS 3 ana"),
        (all("Users online (3): ana, bob, zoe\n"), all("ana bob zoe"))
    );
    let joined = all("Érica joined the chat. Online (4): ana, bob, Érica, zoe\n");
    assert_eq!(shown("JOINED Érica 4"), (joined, all("ana bob Érica zoe")));
    assert_eq!(shown("USERS 4 zoe bob ana Érica"), (nothing(), all("ana bob Érica zoe")));
    let left = all("bob left the chat. Online (3): ana, Érica, zoe\n");
    assert_eq!(shown("LEFT bob 3 quit"), (left, all("ana Érica zoe")));
    // If the roster and the count differ, only the count is shown.
    assert_eq!(shown("JOINED eve 9").0, "eve joined the chat. (9 online)\n");
}

#[test]
fn a_roster_wider_than_the_row_is_shown_as_a_number() {
    let (mut client, _sent) = welcomed(terminal(40));
    client.arrived("USERS 2 ana bartholomew").unwrap();
    client.screen.pending.clear();
    client.arrived("JOINED eve 3").unwrap();
    client.arrived("LEFT bartholomew 2 quit").unwrap();
    assert_eq!(
        client.screen.pending,
        "\x1b[2meve joined the chat. (3 online)\x1b[0m\n\
         \x1b[2mbartholomew left the chat. (2 online)\x1b[0m\n"
    );
    client.screen.pending.clear();
    client.arrived("JOINED bo 3").unwrap();
    assert_eq!(client.screen.pending, "\x1b[2mbo joined the chat. (3 online)\x1b[0m\n");
}

#[test]
fn a_roster_is_shown_if_it_and_the_time_fit_into_the_row() {
    let line = format!("eve joined the chat. Online (3): ana, bob{}, eve", "b".repeat(20));
    for (columns, is_shown) in [(line.len() + TIME, true), (line.len() + TIME - 1, false)] {
        let (mut client, _sent) = welcomed(Screen { shows_time: true, ..terminal(columns) });
        client.arrived(&format!("USERS 2 ana bob{}", "b".repeat(20))).unwrap();
        client.arrived("JOINED eve 3").unwrap();
        let expected = if is_shown { &line } else { "eve joined the chat. (3 online)" };
        assert!(client.screen.pending.contains(expected), "{columns} columns");
    }
}

#[test]
fn rosters_may_come_at_any_time_and_joined_and_left_update_them() {
    let (mut client, _sent) = welcomed(plain());
    for (line, names) in [
        ("JOINED bob 3", "bob"),
        ("USERS 3 ana bob eve", "ana bob eve"),
        ("LEFT bob 2 quit", "ana eve"),
        ("JOINED zoe 3", "ana eve zoe"),
        ("USERS 2 ana zoe", "ana zoe"),
        // A list in two lines.
        ("USERS 3 ana", "ana"),
        ("USERS 3 bob zoe", "ana bob zoe"),
    ] {
        client.arrived(line).unwrap();
        assert_eq!(client.roster.sorted().join(" "), names, "{line}");
    }
}

#[test]
fn the_log_holds_shown_lines_and_own_messages_without_styles() {
    let path = env::temp_dir().join(format!("linechat-log-{}", std::process::id()));
    let log = || Some(OpenOptions::new().append(true).create(true).open(&path).unwrap());
    let screens = [
        Screen { log: log(), has_colours: true, ..terminal(80) },
        Screen { log: log(), ..plain() },
    ];
    for screen in screens {
        let is_piped = !screen.has_editor;
        let (mut client, _sent) = greeted(Some("ana"), screen);
        client.options.is_piped = is_piped;
        client.arrived("WELCOME ana 2").unwrap();
        client.entered("hello").unwrap();
        client.send_waiting().unwrap();
        for line in ["PONG 1", "MSG bob hi", "SENT bob psst", "JOINED eve 3"] {
            client.arrived(line).unwrap();
        }
    }
    let written = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let lines = written.lines().map(|line| line.split_at("2026-11-26 01:02:03 ".len()));
    let (times, texts): (Vec<_>, Vec<_>) = lines.unzip();
    let digits = |time: &str| time.replace(|c: char| c.is_ascii_digit(), "0");
    assert!(times.iter().all(|time| digits(time) == "0000-00-00 00:00:00 "), "{times:?}");
    let both =
        ["ana: hello", "bob: hi", "[private to bob] psst", "eve joined the chat. (3 online)"];
    assert_eq!(texts[1..], [both, both].concat());
    assert!(texts[0].starts_with("Welcome, ana!"));
}

#[test]
fn quiet_hides_joins_and_leaves() {
    let (mut client, _sent) = welcomed(plain());
    client.options.is_quiet = true;
    client.screen.pending.clear();
    client.arrived("JOINED bob 3").unwrap();
    client.arrived("LEFT bob 2 quit").unwrap();
    assert_eq!(client.screen.pending, "");
    client.arrived("MSG bob hi").unwrap();
    assert_eq!(client.screen.pending, "bob: hi\n");
}

#[test]
fn the_roster_of_a_large_room_is_requested() {
    for (count, requests) in [("2", &[][..]), ("100", &[]), ("101", &["LIST\nPING 1\n"])] {
        let (mut client, sent) = greeted(Some("ana"), terminal(80));
        client.arrived(&format!("WELCOME ana {count}")).unwrap();
        assert_eq!(sent.try_iter().skip(1).collect::<Vec<_>>(), requests, "{count}");
    }
}

#[test]
fn the_roster_is_bounded() {
    let mut roster = Roster::default();
    (0..=MAX_ROSTER).for_each(|number| roster.add(&number.to_string()));
    assert_eq!(roster.names.len(), MAX_ROSTER);
}

#[test]
fn overlong_names_are_ignored() {
    let (mut client, _sent) = welcomed(plain());
    let long = "x".repeat(MAX_NAME + 1);
    for keyword in ["JOINED", "LEFT", "MSG", "PRIV", "SENT", "USERS 2"] {
        client.arrived(&format!("{keyword} {long} b")).unwrap();
    }
    assert!(!client.screen.pending.contains(&long));
    assert_eq!(client.roster.sorted(), ["b"]);
}

// The command line

#[test]
fn host_and_port_may_be_one_word_or_two() {
    for (arguments, address, name) in [
        (&[][..], "localhost:9999", None),
        (&["host"], "host:9999", None),
        (&["host:1"], "host:1", None),
        (&["::1"], "[::1]:9999", None),
        (&["[::1]"], "[::1]:9999", None),
        (&["[::1]:1"], "[::1]:1", None),
        (&["host", "ana"], "host:9999", Some("ana")),
        // The same order as for telnet and nc.
        (&["host", "23"], "host:23", None),
        (&["host", "23", "ana"], "host:23", Some("ana")),
        (&["::1", "23"], "[::1]:23", None),
        (&["host:1", "23"], "host:1", Some("23")),
        (&["host", "2b"], "host:9999", Some("2b")),
        (&["fe80::1%lo"], "[fe80::1%lo]:9999", None),
        (&["--", "host", "-x"], "host:9999", Some("-x")),
    ] {
        let (command, options) = words(arguments).unwrap();
        assert_eq!(command, None);
        assert_eq!((options.address().as_str(), options.name.as_deref()), (address, name));
    }
}

#[test]
fn options_stand_anywhere() {
    let expected = &Options {
        host: "host".to_owned(),
        port: 9999,
        language: Language::Portuguese,
        name: Some("ana".to_owned()),
        no_colours: true,
        no_times: true,
        rings: true,
        is_quiet: true,
        no_reconnect: true,
        has_commands: true,
        log: Some("file".to_owned()),
        ..Options::default()
    };
    let one = "--bell host --lang pt ana --no-color --no-time --quiet --no-reconnect --commands --log file";
    let other = "--log=file --commands --no-reconnect --quiet --no-time --lang=pt --no-color host ana --bell";
    for line in [one, other] {
        let words = words(&line.split(' ').collect::<Vec<_>>());
        let (command, options) = words.expect(line);
        assert_eq!((command, &options), (None, expected));
    }
    for (option, text) in [
        ("--help", text::USAGE),
        ("-h", text::USAGE),
        ("--version", text::VERSION),
        ("-V", text::VERSION),
    ] {
        let (command, options) = words(&["--lang=pt", option]).unwrap();
        assert_eq!((command, options.language), (Some(text), Language::Portuguese));
    }
}

#[test]
fn usage_errors_name_the_word() {
    for (arguments, text, word) in [
        (&["--lang", "fr"][..], text::NO_SUCH_LANGUAGE, "fr"),
        (&["--lang"], text::NO_SUCH_LANGUAGE, ""),
        (&["--log"], text::NO_SUCH_OPTION, "--log="),
        (&["--colour"], text::NO_SUCH_OPTION, "--colour"),
        (&["host", "ana", "bob"], text::TOO_MANY_WORDS, "bob"),
        (&["localhost:abc"], text::BAD_PORT, "abc"),
        (&["localhost:99999"], text::BAD_PORT, "99999"),
        (&["localhost", "0"], text::BAD_PORT, "0"),
        (&["localhost", "ana\nMSG hi"], text::CONTROL_IN_ARGUMENT, "ana\\nMSG hi"),
    ] {
        assert_eq!(words(arguments), Err((text, word.to_owned())));
    }
}

#[test]
fn the_first_variable_that_is_set_decides_the_locale() {
    let locale = |all: &str, messages: &str, lang: &str| {
        let set = |value: &str| Some(value.to_owned()).filter(|value| !value.is_empty());
        locale(|variable| match variable {
            "LC_ALL" => set(all),
            "LC_MESSAGES" => set(messages),
            _ => set(lang),
        })
    };
    assert_eq!(locale("", "", "pt_BR.UTF-8"), "pt_BR.UTF-8");
    assert_eq!(locale("", "pt", "en_US.UTF-8"), "pt");
    assert_eq!(locale("C", "pt", "pt"), "C");
}

#[test]
fn a_login_name_is_offered_if_it_is_a_possible_name() {
    let offered = |name: &str| login_name(|it| Some(name.to_owned()).filter(|_| it == "USER"));
    let longest = "x".repeat(MAX_NAME);
    for name in ["ana", "mãe-2_b.c", "2", &longest] {
        assert_eq!(offered(name), Some(name.to_owned()));
    }
    for name in ["_apt", "ana maria", ".a", "a@b", &format!("{longest}x")] {
        assert_eq!(offered(name), None, "{name}");
    }
}

#[test]
fn every_address_of_a_host_is_tried() {
    // On most machines localhost is ::1 too, where no server listens.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(connect("localhost", port).is_ok());
}
