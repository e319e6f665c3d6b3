// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"encoding/json"
	"io"
	"strings"
	"testing"
)

func TestBodySlice(t *testing.T) {
	const text = "0123456789"
	for size := range byte(5) {
		b := split([]byte(text), []byte{size, 0, 3})
		for start := range len(text) + 2 {
			for end := start; end < len(text)+3; end++ {
				part := b.Slice(Span{start, end})
				want := text[min(start, len(text)):min(end, len(text))]
				if got := joined(part.Chunks); got != want || part.Len != len(want) {
					t.Errorf("chunks of %d, %d to %d: %q, length %d", size, start, end, got, part.Len)
				}
			}
		}
		if part := b.Slice(Span{5, 2}); part.Len != 0 || len(part.Chunks) != 0 {
			t.Errorf("a span that ends before it starts: %+v", part)
		}
	}
	b := bodyOf(text)
	if part := b.Slice(Span{2, 5}); &part.Chunks[0][0] != &b.Chunks[0][2] || cap(part.Chunks[0]) != 3 {
		t.Error("the part was copied, or can be appended to")
	}
}

func TestBodyReader(t *testing.T) {
	b := split([]byte("0123456789"), []byte{3})
	first, second := b.Reader(), b.Reader()
	one, _ := io.ReadAll(io.LimitReader(first, 4))
	two, err := io.ReadAll(second)
	rest := new(strings.Builder)
	if _, err := io.Copy(rest, first); err != nil {
		t.Fatal(err)
	}
	if string(one) != "0123" || string(two) != "0123456789" || rest.String() != "456789" || err != nil {
		t.Errorf("%q, %q, %q, %v", one, two, rest, err)
	}
}

// TestMemberAndField compares both with encoding/json, whatever the chunks.
func TestMemberAndField(t *testing.T) {
	const text = ` {"model":"a","x":{"b":[1,{"b":2}],"\u0062" : "c\"}" , "d":-1.5e3},"model" :"z","e":null}`
	var want map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &want); err != nil {
		t.Fatal(err)
	}
	for size := range byte(6) {
		body := split([]byte(text), []byte{size})
		r, err := Parse(Chat, body)
		if err != nil {
			t.Fatal(err)
		}
		said := func(s Span) string { return joined(body.Slice(s).Chunks) }
		for _, name := range []string{"model", "x", "e", "b", ""} {
			field, ok := r.Field(name)
			member, isMember := body.Member(Span{0, len(text)}, name)
			if ok != (want[name] != nil) || isMember != ok || said(field) != string(want[name]) || member != field {
				t.Errorf("%s: field %q %v, member %q %v, want %q", name, said(field), ok, said(member), isMember, want[name])
			}
		}
		x, _ := r.Field("x")
		if b, ok := body.Member(x, "b"); !ok || said(b) != `"c\"}"` {
			t.Errorf("inner member: %q", said(b))
		}
		for _, s := range []Span{{}, {3, 3}, {2, 9}, {0, 30}, {40, 20}} {
			if got, ok := body.Member(s, "b"); ok {
				t.Errorf("%v: member %v of what is no object", s, got)
			}
		}
	}
	if _, ok := Unread(bodyOf(text)).Field("x"); ok {
		t.Error("an unread body has fields")
	}
}

func TestSpanEdits(t *testing.T) {
	const text = `{"a":[{"p":1,"q":[2]}, 3],"b":{"c":4},"b":{"c":5}}`
	at := func(part string) Span {
		i := strings.Index(text, part)
		return Span{i, i + len(part)}
	}
	f := func(name string, edit func(*Edits), want string) {
		t.Helper()
		for size := range byte(4) {
			r, err := Parse(Chat, split([]byte(text), []byte{size}))
			if err != nil {
				t.Fatal(err)
			}
			e := r.Edit()
			edit(e)
			if got := joined(e.Chunks()); got != want || e.Len() != len(want) {
				t.Errorf("%s:\n got %s (length %d)\nwant %s", name, got, e.Len(), want)
			}
		}
	}
	part, inner := at(`{"p":1,"q":[2]}`), at(`[2]`)
	f("one value", func(e *Edits) { e.ReplaceSpan(part, []byte(`9`)) }, `{"a":[9, 3],"b":{"c":4},"b":{"c":5}}`)
	f("two", func(e *Edits) { e.ReplaceSpan(at("3"), []byte(`8`)); e.ReplaceSpan(part, []byte(`9`)) }, `{"a":[9, 8],"b":{"c":4},"b":{"c":5}}`)
	f("the last call wins", func(e *Edits) { e.ReplaceSpan(part, []byte(`8`)); e.ReplaceSpan(part, []byte(`9`)) }, `{"a":[9, 3],"b":{"c":4},"b":{"c":5}}`)
	f("the outer one wins", func(e *Edits) { e.ReplaceSpan(part, []byte(`8`)); e.ReplaceSpan(inner, []byte(`9`)) }, `{"a":[8, 3],"b":{"c":4},"b":{"c":5}}`)
	f("a set field wins", func(e *Edits) { e.Set("a", []byte(`0`)); e.ReplaceSpan(part, []byte(`8`)) }, `{"a":0,"b":{"c":4},"b":{"c":5}}`)
	f("over its own span, too", func(e *Edits) { e.ReplaceSpan(at(`{"c":5}`), []byte(`8`)); e.Set("b", []byte(`0`)) }, `{"a":[{"p":1,"q":[2]}, 3],"b":0}`)
	f("a removed field wins", func(e *Edits) { e.ReplaceSpan(part, []byte(`8`)); e.Remove("a") }, `{"b":{"c":4},"b":{"c":5}}`)
	f("with other edits", func(e *Edits) { e.Set("d", []byte(`0`)); e.ReplaceSpan(inner, nil); e.Remove("b") }, `{"a":[{"p":1,"q":null}, 3],"d":0}`)
	f("a member", func(e *Edits) { e.AddMember(part, `u"`, []byte(`"k"`)) }, `{"a":[{"u\"":"k","p":1,"q":[2]}, 3],"b":{"c":4},"b":{"c":5}}`)
	f("a member of what goes", func(e *Edits) { e.AddMember(part, "u", []byte(`1`)); e.ReplaceSpan(part, []byte(`9`)) }, `{"a":[9, 3],"b":{"c":4},"b":{"c":5}}`)
	f("nothing", func(e *Edits) { e.ReplaceSpan(Span{}, []byte(`9`)); e.AddMember(Span{}, "u", []byte(`9`)) }, text)
	f("outside", func(e *Edits) {
		e.ReplaceSpan(Span{0, 999}, []byte(`9`))
		e.ReplaceSpan(Span{-1, 3}, nil)
		e.AddMember(Span{-3, 9}, "u", nil)
	}, text)
	f("kept", func(e *Edits) {
		e.Set("a", []byte(`0`))
		e.Remove("b")
		e.Restore("a")
		e.Restore("b")
		e.Restore("zz")
	}, text)
	f("spans kept", func(e *Edits) {
		e.ReplaceSpan(inner, nil)
		e.AddMember(part, "u", nil)
		e.KeepSpans()
		e.Set("b", []byte(`0`))
	}, `{"a":[{"p":1,"q":[2]}, 3],"b":0}`)
}
