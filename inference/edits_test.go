// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func joined(chunks [][]byte) string { return string(bytes.Join(chunks, nil)) }

func TestEdits(t *testing.T) {
	f := func(body string, edit func(*Edits), want string) {
		t.Helper()
		for size := range byte(4) {
			r, err := Parse(Chat, split([]byte(body), []byte{size}))
			if err != nil {
				t.Fatal(err)
			}
			e := r.Edit()
			edit(e)
			if got := joined(e.Chunks()); got != want || e.Len() != len(want) {
				t.Errorf("chunks of %d:\n  body %s\n   got %s (length %d)\n  want %s", size, body, got, e.Len(), want)
			}
			if e.Empty() != (body == want) {
				t.Errorf("Empty() = %v", e.Empty())
			}
		}
	}
	strip := func(e *Edits) { e.StripTransferFields() }
	set := func(name, value string) func(*Edits) { return func(e *Edits) { e.Set(name, []byte(value)) } }
	remove := func(name string) func(*Edits) { return func(e *Edits) { e.Remove(name) } }
	sampling := func(name, value string) func(*Edits) { return func(e *Edits) { e.SetSampling(name, []byte(value)) } }

	f(`{"a":1}`, func(*Edits) {}, `{"a":1}`)
	// Removing, in every position.
	f(`{"a":1}`, remove("a"), `{}`)
	f(`{ "a" : 1 }`, remove("a"), `{  }`)
	f(`{"a":1, "b":2, "c":3}`, remove("a"), `{"b":2, "c":3}`)
	f(`{"a":1, "b":2, "c":3}`, remove("b"), `{"a":1, "c":3}`)
	f(`{"a":1, "b":2, "c":3 }`, remove("c"), `{"a":1, "b":2 }`)
	f(`{"a":1,"a":2,"b":3}`, remove("a"), `{"b":3}`)
	f(`{"b":3,"a":1,"a":2}`, remove("a"), `{"b":3}`)
	f(`{"a":1,"b":3,"a":2}`, remove("a"), `{"b":3}`)
	f(`{"a":1}`, remove("b"), `{"a":1}`)
	f(`{"\u0061":1}`, remove("a"), `{}`)
	f(`{"a":1,"b":2}`, func(e *Edits) { e.Remove("a"); e.Remove("b") }, `{}`)
	// Setting.
	f(`{}`, set("a", "1"), `{"a":1}`)
	f("{\n}", set("a", "1"), "{\"a\":1\n}")
	f(`{"b":2}`, set("a", "1"), `{"b":2,"a":1}`)
	f(`{"a": [2] ,"b":2}`, set("a", "1"), `{"a": 1 ,"b":2}`)
	f(`{"a":1,"b":2,"a":3}`, set("a", "4"), `{"b":2,"a":4}`)
	f(`{"b":2}`, func(e *Edits) { e.Remove("b"); e.Set("a", []byte("1")) }, `{"a":1}`)
	f(`{"b":2}`, func(e *Edits) { e.Set("a", []byte("1")); e.Set("c", []byte("2")) }, `{"b":2,"a":1,"c":2}`)
	f(`{"b":2}`, func(e *Edits) { e.Set("b", []byte("1")); e.Remove("b") }, `{}`)
	f(`{"b":2}`, func(e *Edits) { e.Remove("b"); e.Set("b", []byte("1")) }, `{"b":1}`)
	f(`{"b":2}`, set("b", ""), `{"b":null}`)
	f(`{"model":"a","x":1}`, func(e *Edits) { e.SetModel(`b"é`) }, `{"model":"b\"é","x":1}`)
	// Transfer fields.
	f(`{"kv_transfer_params":{"do_remote_prefill":true}}`, strip, `{}`)
	f(`{"a":1,"kv_transfer_params":1,"b":2,"kv\u005ftransfer_params":2}`, strip, `{"a":1,"b":2}`)
	f(`{"bootstrap_host":1,"bootstrap_room":2,"bootstrap":3,"Bootstrap_port":4}`, strip, `{"bootstrap":3,"Bootstrap_port":4}`)
	f(`{"ec_transfer_params":1,"disaggregated_params":2,"a":{"kv_transfer_params":1}}`, strip, `{"a":{"kv_transfer_params":1}}`)
	f(`{"sampling_params":{"extra_args":{"kv_transfer_params":1,"x":2}},"sampling_params":{"n":1,"extra_args":{"bootstrap_x":1}}}`,
		strip, `{"sampling_params":{"extra_args":{"x":2}},"sampling_params":{"n":1,"extra_args":{}}}`)
	f(`{"sampling_params":[{"kv_transfer_params":1},5,{"extra_args":{"kv_transfer_params":1}}]}`, strip, `{"sampling_params":[{},5,{"extra_args":{}}]}`)
	f(`{"vllm_xargs":{"kv_transfer_params":"x","y":1}}`, strip, `{"vllm_xargs":{"y":1}}`)
	f(`{"kv_transfer_params":1,"a":2}`, func(e *Edits) { e.StripTransferFields(); e.Set("kv_transfer_params", []byte("3")) }, `{"kv_transfer_params":3,"a":2}`)
	f(`{"a":2}`, func(e *Edits) { e.Set("kv_transfer_params", []byte("3")); e.StripTransferFields() }, `{"a":2,"kv_transfer_params":3}`)
	// sampling_params.
	f(`{}`, sampling("n", "1"), `{"sampling_params":{"n":1}}`)
	f(`{"a":1}`, func(e *Edits) { e.SetSampling("n", []byte("1")); e.SetSampling("m", []byte("2")) }, `{"a":1,"sampling_params":{"n":1,"m":2}}`)
	f(`{"sampling_params":null}`, sampling("n", "1"), `{"sampling_params":{"n":1}}`)
	f(`{"sampling_params":{}}`, sampling("n", "1"), `{"sampling_params":{"n":1}}`)
	f(`{"sampling_params":{"n":2,"n":3}}`, sampling("n", "1"), `{"sampling_params":{"n":1}}`)
	f(`{"sampling_params":{"n":2},"sampling_params":{"m":3}}`, sampling("n", "1"), `{"sampling_params":{"n":2},"sampling_params":{"m":3,"n":1}}`)
	f(`{"sampling_params":{"n":2},"sampling_params":null}`, sampling("n", "1"), `{"sampling_params":{"n":1}}`)
	f(`{"sampling_params":[{"n":2}]}`, sampling("n", "1"), `{"sampling_params":[{"n":2}]}`)
	f(`{"sampling_params":{"n":2,"m":1}}`, func(e *Edits) { e.RemoveSampling("n") }, `{"sampling_params":{"m":1}}`)
	f(`{"sampling_params":{"n":2}}`, func(e *Edits) { e.RemoveSampling("n"); e.SetSampling("m", []byte("1")) }, `{"sampling_params":{"m":1}}`)
	f(`{"a":1}`, func(e *Edits) { e.RemoveSampling("n") }, `{"a":1}`)
	f(`{"sampling_params":{"extra_args":{"kv_transfer_params":1}}}`, func(e *Edits) { e.StripTransferFields(); e.SetSampling("extra_args", []byte(`{"x":1}`)) },
		`{"sampling_params":{"extra_args":{"x":1}}}`)
	f(`{"sampling_params":{"extra_args":{"kv_transfer_params":1}},"a":1}`, func(e *Edits) { e.StripTransferFields(); e.Remove("sampling_params") }, `{"a":1}`)
}

func TestEditsOfUnknown(t *testing.T) {
	for body, want := range map[string]string{
		`{"a":1,"kv_transfer_params":2}`: `{"a":1}`,
		`[{"kv_transfer_params":2}]`:     `[{"kv_transfer_params":2}]`,
		` 5 `:                            ` 5 `,
		``:                               ``,
	} {
		r, err := Parse(Unknown, bodyOf(body))
		if err != nil {
			t.Fatal(err)
		}
		e := r.Edit()
		e.StripTransferFields()
		e.Set("a", []byte("3"))
		if got := joined(e.Chunks()); got != want {
			t.Errorf("%s: got %s", body, got)
		}
	}
	r := Unread(bodyOf(`{"kv_transfer_params":1}`))
	if e := r.Edit(); !e.Empty() || e.Len() != r.Body.Len {
		t.Error("edits of an unread body change it")
	}
}

// TestEditsShareChunks makes sure that nothing is copied, and nothing of the original written to.
func TestEditsShareChunks(t *testing.T) {
	body := []byte(`{"model":"a","prompt":"` + strings.Repeat("x", 100) + `","n":1}`)
	r, err := Parse(Completions, split(body, []byte{40}))
	if err != nil {
		t.Fatal(err)
	}
	e := r.Edit()
	e.Remove("n")
	first, again := e.Chunks(), e.Reader()
	if &first[0][0] != &body[0] {
		t.Error("the first chunk was copied")
	}
	for _, c := range first {
		_ = append(c, "overwritten"...)
	}
	if joined(r.Body.Chunks) != string(body) || !bytes.HasSuffix(body, []byte(`"n":1}`)) {
		t.Errorf("the body was written to: %s", body)
	}
	e.SetModel("other") // does not show in a reader made before
	one, _ := io.ReadAll(again)
	two := new(bytes.Buffer)
	if _, err := e.Reader().(io.WriterTo).WriteTo(two); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(one), "other") || !strings.Contains(two.String(), "other") || two.Len() != e.Len() {
		t.Errorf("readers:\n%s\n%s", one, two)
	}
}

// An operation is one call of an Edits method.
type operation struct {
	sampling bool
	name     string
	value    string // "" to remove
}

func (o operation) String() string { return fmt.Sprintf("%v %s=%s", o.sampling, o.name, o.value) }

func randomOperations(r *rand.Rand) (ops []operation, strip bool) {
	for range r.IntN(6) {
		o := operation{sampling: r.IntN(3) == 0, name: randomKeys[r.IntN(len(randomKeys))]}
		if r.IntN(3) > 0 {
			o.value = []string{`1`, `"x"`, `{"y":[1]}`, `null`}[r.IntN(4)]
		}
		ops = append(ops, o)
	}
	return ops, r.IntN(2) == 0
}

// TestRestore takes an edit back as if it had not been made, duplicates included.
func TestRestore(t *testing.T) {
	r, err := Parse(Completions, split([]byte(`{"prompt":"a","n":1,"prompt":"b","kv_transfer_params":{}}`), nil))
	if err != nil {
		t.Fatal(err)
	}
	e := r.Edit()
	e.StripTransferFields()
	e.Set("prompt", []byte(`[1]`))
	e.Set("kv_transfer_params", []byte(`{"a":1}`))
	e.Set("new", []byte(`1`))
	e.Remove("n")
	for _, field := range []string{"prompt", "kv_transfer_params", "new", "n", "never"} {
		e.Restore(field)
	}
	if got, want := string(bytes.Join(e.Chunks(), nil)), `{"prompt":"a","n":1,"prompt":"b"}`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A spanOperation replaces a value, or adds a member to an object if it has a name.
type spanOperation struct {
	start, end  int
	name, value string
}

// randomSpans chooses values of n, the root, to be replaced, and objects in the prompt to grow.
func randomSpans(r *rand.Rand, n *node) (ops []spanOperation) {
	for range r.IntN(4) {
		prompt := false
		for v := n; ; {
			if v != n && (r.IntN(3) == 0 || len(v.vals) == 0) {
				o := spanOperation{start: v.start, end: v.end, value: []string{`7`, `"é"`, `{"w":[]}`, `null`}[r.IntN(4)]}
				if prompt && v.kind == '{' && len(v.vals) > 0 && r.IntN(2) == 0 {
					o.name = "uuid"
					ops = slices.DeleteFunc(ops, func(x spanOperation) bool { return x.name != "" && x.start == o.start })
				}
				ops = append(ops, o)
				break
			}
			if len(v.vals) == 0 {
				break
			}
			i := r.IntN(len(v.vals))
			if v == n {
				prompt = v.kind == '{' && !slices.Contains([]string{"sampling_params", "extra_args", "vllm_xargs"}, v.keys[i])
			}
			v = v.vals[i]
		}
	}
	return ops
}

// checkEdits applies random edits and compares what comes out, member by member, with what should.
func checkEdits(t *testing.T, api API, body, sizes []byte, seed uint64) {
	t.Helper()
	r, err := Parse(api, split(body, sizes))
	if err != nil || len(body) == 0 {
		return
	}
	random := rand.New(rand.NewPCG(seed, 3))
	ops, strip := randomOperations(random)
	spans := randomSpans(random, oracle(body))
	e := r.Edit()
	if strip {
		e.StripTransferFields()
	}
	for _, o := range ops {
		value := []byte(o.value)
		switch {
		case o.sampling && o.value != "":
			e.SetSampling(o.name, value)
		case o.sampling:
			e.RemoveSampling(o.name)
		case o.value != "":
			e.Set(o.name, value)
		default:
			e.Remove(o.name)
		}
	}
	for _, o := range spans {
		if o.name != "" {
			e.AddMember(Span{o.start, o.end}, o.name, []byte(o.value))
		} else {
			e.ReplaceSpan(Span{o.start, o.end}, []byte(o.value))
		}
	}
	edited := []byte(joined(e.Chunks()))
	if e.Len() != len(edited) || joined(r.Body.Chunks) != string(body) {
		t.Fatalf("%q: length %d of %d, or the body changed", body, e.Len(), len(edited))
	}
	root := oracle(edited)
	if root == nil {
		t.Fatalf("%q with %v %v became %q, which is no JSON", body, ops, spans, edited)
	}
	if api == Unknown {
		ops, spans = nil, nil
	}
	want := editor{body: body, strip: strip, ops: ops, spans: spans}.top(oracle(body))
	got := editor{body: edited}.top(root)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("%q\nwith %v %v strip %v became\n%q (-want +got)\n%s", body, ops, spans, strip, edited, diff)
	}
	if strip {
		again, err := Parse(Unknown, split(edited, nil))
		wanted := false
		for _, o := range ops {
			wanted = wanted || o.value != "" && isRouterField(o.name)
		}
		if err != nil || again.HasTransferFields && !wanted {
			t.Fatalf("%q: still transfer fields (%v)", edited, err)
		}
	}
}

func TestEditsRandom(t *testing.T) {
	for i := range 5_000 {
		r := rand.New(rand.NewPCG(uint64(i), 8))
		checkEdits(t, API(r.IntN(apis)), randomRequest(r), []byte{byte(r.IntN(9)), byte(1 + r.IntN(5))}, uint64(i))
	}
}

// FuzzEdits makes sure that an edited body parses and differs only where it was edited.
func FuzzEdits(f *testing.F) {
	addSeeds(f, func(api API, body []byte) { f.Add(byte(api), body, []byte{7}, uint64(len(body))) })
	f.Fuzz(func(t *testing.T, api byte, body, sizes []byte, seed uint64) {
		checkEdits(t, API(int(api)%apis), body, sizes, seed)
	})
}
