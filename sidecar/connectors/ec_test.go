// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/alloctest"
)

// mediaClients are the requests with media, in testdata/media.
var mediaClients = map[string]inference.API{
	"chat": inference.Chat, "responses": inference.Responses, "messages": inference.Messages,
}

// encoding is the encode phase of a request in testdata/media.
func encoding(tb testing.TB, name string) *Encoding {
	tb.Helper()
	body, err := os.ReadFile("testdata/media/" + name + ".client.json")
	if err != nil {
		tb.Fatal(err)
	}
	return encodingOf(parse(tb, mediaClients[name], body))
}

func encodingOf(r *inference.Request) *Encoding {
	x := &Encoding{Request: r}
	for i := range r.Media {
		x.Keys = append(x.Keys, MediaKey(r, i))
	}
	return x
}

// TestEncodeLegs compares the encode leg of every item of every API with reviewed files; an item that has none is one
// that cannot be sent alone.
func TestEncodeLegs(t *testing.T) {
	for _, connector := range slices.Sorted(maps.Keys(encoders())) {
		wire, traits, err := LookupEncoder(connector)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range slices.Sorted(maps.Keys(mediaClients)) {
			if traits.Serves(mediaClients[name]) {
				t.Run(connector+"/"+name, func(t *testing.T) { checkItems(t, connector+"/"+name, wire, encoding(t, name)) })
			}
		}
	}
}

func checkItems(t *testing.T, name string, wire Encoder, x *Encoding) {
	t.Helper()
	var legs []byte
	for i := range x.Request.Media {
		body, ok := wire.Item(x, i)
		if !ok {
			legs = fmt.Appendf(legs, "item %d: not alone\n", i)
			continue
		}
		leg, err := io.ReadAll(body.Reader())
		if err != nil || len(leg) != body.Len || !json.Valid(leg) {
			t.Errorf("item %d: %d of %d bytes, %v: %s", i, len(leg), body.Len, err, leg)
		}
		read := fields(t, leg)
		if read["model"] != fields(t, bytes.Join(x.Request.Body.Chunks, nil))["model"] {
			t.Errorf("item %d: model %v", i, read["model"])
		}
		legs = fmt.Appendf(legs, "item %d: %s\n", i, leg)
		if encoded := parse(t, inference.Chat, leg); len(encoded.Media) != 1 || encoded.Stream || encoded.MaxTokens != 1 {
			t.Errorf("item %d: %d items, stream %v, %d tokens", i, len(encoded.Media), encoded.Stream, encoded.MaxTokens)
		}
	}
	if bytes.Contains(legs, []byte("evil")) {
		t.Errorf("a transfer field is in a leg: %s", legs)
	}
	compare(t, name+".items.golden.txt", legs)
}

// TestItemAllocations shows that large media are not copied, and that another model can be asked for.
func TestItemAllocations(t *testing.T) {
	big := []byte(`{"model":"a","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:,` +
		strings.Repeat("x", 1<<20) + `"}}]}]}`)
	var body inference.Body
	body.Append(big)
	r, err := inference.Parse(inference.Chat, body)
	if err != nil {
		t.Fatal(err)
	}
	x := encodingOf(r)
	x.Model = `b"é`
	for name, e := range encoders() {
		leg, ok := e.encoder.Item(x, 0)
		shared := 0
		for _, chunk := range leg.Chunks {
			if i := bytes.Index(big, chunk); len(chunk) > 1<<19 && i >= 0 && &big[i] == &chunk[0] {
				shared += len(chunk)
			}
		}
		if !ok || leg.Len-shared > 300 {
			t.Errorf("%s: %d of %d bytes are the client's", name, shared, leg.Len)
		}
		if model := fields(t, bytes.Join(leg.Chunks, nil))["model"]; model != x.Model {
			t.Errorf("%s: model %v", name, model)
		}
		alloctest.AtMost(t, 40, name, func() { _, _ = e.encoder.Item(x, 0) })
	}
}

func TestMediaKey(t *testing.T) {
	x := encoding(t, "chat")
	m := x.Request.Media
	want := sha256.Sum256([]byte("image_url\x00" + `{"url":"https:\/\/example.com\/a?b=\"c\"&d=\u00e9", "detail":"low"}`))
	if x.Keys[0] != hex.EncodeToString(want[:]) {
		t.Errorf("%v: %s", m[0], x.Keys[0])
	}
	if x.Keys[1] != x.Keys[4] || x.Keys[1] == x.Keys[0] || x.Keys[1] != x.Keys[5] {
		t.Errorf("equal items, different keys, or the reverse: %v", x.Keys)
	}
	r := parse(t, inference.Chat, []byte(`{"messages":[{"role":"user","content":[{"image_url":{"url":"u"}},{"video_url":{"url":"u"}}]}]}`))
	if MediaKey(r, 0) == MediaKey(r, 1) {
		t.Error("an image and a video have the same key")
	}
}

// handlesOf are what encode endpoints answer for the items of the chat client; item 3 was not encoded.
func handlesOf(x *Encoding) [][]byte {
	entry := func(i int, more string) []byte {
		return fmt.Appendf(nil, `{"%s" : {%s"item_indices":[0],"peer_host":"10.0.0.5","peer_port":5601,"size_bytes":9007199254740993}}`, x.Keys[i], more)
	}
	return [][]byte{
		entry(0, `"metadata":{"grid":[[1, 1e400,9007199254740993]]},`), []byte(`{"mine\/1":{"metadata":{"g":1}},"mine/1":{"metadata":{"g":2}, "peer_host":"later"}}`),
		entry(2, `"metadata":{ },"metadata":{"len":7},`), nil, []byte(`{"mine\u002f1":{"metadata":{"g":3}}}`),
		[]byte(`{"mine/1":{"metadata":{"g":4}}}`), entry(6, `"metadata":{"never":1},`), nil, entry(8, `"nixl_agent_metadata_b64":"eA==",`),
	}
}

// TestEmbeddingLegs compares the bodies of the legs behind the encode phase with reviewed files: as media or as
// embeddings, for the endpoint that uses these and for one that does not.
func TestEmbeddingLegs(t *testing.T) {
	for _, lean := range []bool{false, true} {
		for _, consumer := range []bool{false, true} {
			x := encoding(t, "chat")
			x.Lean = lean
			handles := handlesOf(x)
			if len(handles) != len(x.Request.Media) {
				t.Fatalf("%d items", len(x.Request.Media))
			}
			body := stripped(x.Request)
			ecNixl{}.Splice(x, handles, consumer, body)
			name := map[bool]string{false: "safe", true: "lean"}[lean] + map[bool]string{false: "", true: ".consumer"}[consumer]
			leg := written(t, body)
			compare(t, "ec-nixl/chat."+name+".golden.json", leg)

			again := stripped(x.Request)
			ecNixl{}.Splice(x, slices.Repeat([][]byte{[]byte(`{"a":{}}`)}, len(handles)), !consumer, again)
			ecNixl{}.Splice(x, handles, consumer, again)
			if diff := cmp.Diff(string(leg), string(written(t, again))); diff != "" {
				t.Errorf("%s: the last call does not count (-once +again):\n%s", name, diff)
			}
			ecNixl{}.Splice(x, make([][]byte, len(handles)), consumer, again)
			if diff := cmp.Diff(string(written(t, stripped(x.Request))), string(written(t, again))); diff != "" {
				t.Errorf("%s: with nothing encoded (-client +leg):\n%s", name, diff)
			}
		}
	}
	x := encoding(t, "chat")
	body := stripped(x.Request)
	ecExample{}.Splice(x, make([][]byte, len(x.Keys)), true, body)
	if string(written(t, body)) != string(written(t, stripped(x.Request))) {
		t.Error("ec-example changes a body")
	}
}

// TestEmbeddingsAgree shows that an item has the same uuid in its encode leg and in every further one.
func TestEmbeddingsAgree(t *testing.T) {
	x := encoding(t, "chat")
	handles := handlesOf(x)
	for _, lean := range []bool{false, true} {
		x.Lean = lean
		body := stripped(x.Request)
		ecNixl{}.Splice(x, handles, true, body)
		var leg struct {
			Messages []struct{ Content json.RawMessage }
		}
		if err := json.Unmarshal(written(t, body), &leg); err != nil {
			t.Fatal(err)
		}
		var parts []map[string]json.RawMessage
		if err := json.Unmarshal(leg.Messages[1].Content, &parts); err != nil {
			t.Fatal(err)
		}
		at := []int{1, 2, 3, 4, 5, 6, 7, 7, 8}
		for i, h := range handles {
			item, ok := ecNixl{}.Item(x, i)
			if !ok || h == nil {
				continue
			}
			frame, _ := partFrame(parse(t, inference.Chat, bytes.Join(item.Chunks, nil)), 0)
			if want := string(sentUUID(frame)); want == "" || string(parts[at[i]]["uuid"]) != want {
				t.Errorf("lean %v, item %d: %s at the encoder, %s behind it", lean, i, want, parts[at[i]]["uuid"])
			}
		}
	}
}

// TestEmbeddingsAreBounded shows that handles which do not fit leave their items as they are, at every endpoint alike.
func TestEmbeddingsAreBounded(t *testing.T) {
	client := `{"messages":[{"role":"user","content":[` + strings.Repeat(`{"image_url":{"url":"u"}},`, 40) + `7]}]}`
	x := encodingOf(parse(t, inference.Chat, []byte(client)))
	x.Lean = true
	var handles [][]byte
	for i := range x.Keys {
		handles = append(handles, fmt.Appendf(nil, `{"%d":{"metadata":{"i":1},"x":"%s"}}`, i, strings.Repeat("x", 100_000)))
	}
	embeds := func(consumer bool) int {
		body := stripped(x.Request)
		ecNixl{}.Splice(x, handles, consumer, body)
		leg := written(t, body)
		if len(leg) > len(client)+maxEmbeddings+100*len(handles) {
			t.Errorf("%d bytes", len(leg))
		}
		return bytes.Count(leg, []byte("image_embeds")) / 2
	}
	if here, there := embeds(true), embeds(false); here != 10 || there != here {
		t.Errorf("%d and %d embeddings", here, there)
	}
}

func TestEmbeddingAnswer(t *testing.T) {
	f := func(wire Encoder, answer string, want Verdict, handle string) {
		t.Helper()
		mine := []byte(answer)
		a := wire.Answer(&Encoding{}, 0, mine)
		clear(mine)
		if a.Verdict != want || string(a.Handle) != handle || (a.Handle == nil) != (handle == "") {
			t.Errorf("%.80s: %+v", answer, a)
		}
	}
	const good = `{"h" : {"peer_port":9007199254740993, "x":1e400}}`
	f(ecNixl{}, `{"choices":[{"finish_reason":"length"}],"ec_transfer_params":{"old":{}},"ec\u005ftransfer_params": `+good+` }`, Ready, good)
	f(ecNixl{}, `{"choices":[]}`, Missing, "")
	f(ecNixl{}, `{"ec_transfer_params":null}`, Missing, "")
	for _, bad := range []string{`{}`, `{ }`, `[]`, `7`, `"x"`, `true`, `{"h":7}`, `{"h":null}`, `{"h":{"x":NaN}}`, `{"h":{},"i":[]}`} {
		f(ecNixl{}, `{"ec_transfer_params":`+bad+`}`, Incomplete, "")
	}
	f(ecNixl{}, `{"ec_transfer_params":{"h":{"x":"`+strings.Repeat("x", maxEmbeddings)+`"}}}`, Incomplete, "")
	for _, wire := range []Encoder{ecNixl{}, ecExample{}} {
		f(wire, `{"ec_transfer_params":`+good+`,"choices":[{"finish_reason":"error"}]}`, Failed, "")
		f(wire, `{"error":{"message":"x"}}`, Failed, "")
		for _, bad := range []string{``, `[]`, `null`, `<html>`, `{`, `{}x`} {
			f(wire, bad, Malformed, "")
		}
	}
	f(ecExample{}, `{"choices":[],"ec_transfer_params":{}}`, Ready, "")
}

// FuzzEncoderAnswer lets an encode endpoint say anything: what is taken leaves a body that parses.
func FuzzEncoderAnswer(f *testing.F) {
	x := encoding(f, "chat")
	for _, h := range handlesOf(x) {
		f.Add(append(append([]byte(`{"ec_transfer_params":`), h...), '}'), true)
	}
	for _, answer := range hostile[:len(hostile)-2] {
		f.Add([]byte(answer), false)
	}
	f.Fuzz(func(t *testing.T, answer []byte, lean bool) {
		for name, e := range encoders() {
			x.Lean = lean
			a := e.encoder.Answer(x, 0, answer)
			if a.Handle != nil && a.Verdict != Ready {
				t.Errorf("%s: %+v", name, a)
			}
			handles := slices.Repeat([][]byte{a.Handle}, len(x.Keys))
			for _, consumer := range []bool{false, true} {
				body := stripped(x.Request)
				e.encoder.Splice(x, handles, consumer, body)
				parse(t, inference.Chat, written(t, body))
			}
		}
	})
}

// FuzzItem makes encode legs of any request.
func FuzzItem(f *testing.F) {
	for name, api := range mediaClients {
		f.Add(byte(api), bytes.Join(encoding(f, name).Request.Body.Chunks, nil))
	}
	f.Fuzz(func(t *testing.T, api byte, client []byte) {
		var b inference.Body
		b.Append(client[:len(client)/2])
		b.Append(client[len(client)/2:])
		r, err := inference.Parse(inference.API(api%8), b)
		if err != nil || len(r.Media) > 20 {
			t.Skip("no request, or more items than one test should take")
		}
		x := encodingOf(r)
		handles := make([][]byte, len(r.Media))
		for name, e := range encoders() {
			for i := range r.Media {
				leg, ok := e.encoder.Item(x, i)
				if !ok {
					continue
				}
				handles[i] = []byte(`{"h":{"metadata":{"g":1}}}`)
				if _, err := inference.Parse(inference.Chat, leg); err != nil {
					t.Errorf("%s, item %d of %q: %v: %q", name, i, client, err, bytes.Join(leg.Chunks, nil))
				}
			}
			for _, x.Lean = range []bool{false, true} {
				body := stripped(r)
				e.encoder.Splice(x, handles, true, body)
				if _, err := inference.Parse(r.API, inference.Body{Chunks: body.Chunks(), Len: body.Len()}); err != nil {
					t.Errorf("%s: %q became %q: %v", name, client, bytes.Join(body.Chunks(), nil), err)
				}
			}
		}
	})
}

// TestLeanKeepsUnnamedMedia keeps the media of a part whose uuid is no name: the engine takes the media's own hash, which
// an embedding in its place would not have.
func TestLeanKeepsUnnamedMedia(t *testing.T) {
	for _, uuid := range []string{`null`, `""`, `7`} {
		const handle = `{"h":{"metadata":{"g":1}}}`
		client := `{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"a"},"uuid":` + uuid + `}]}]}`
		x := encodingOf(parse(t, inference.Chat, []byte(client)))
		x.Lean = true
		body := stripped(x.Request)
		ecNixl{}.Splice(x, [][]byte{[]byte(handle)}, true, body)
		if got, want := string(written(t, body)), client[:len(client)-1]+`,"ec_transfer_params":`+handle+`}`; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}
