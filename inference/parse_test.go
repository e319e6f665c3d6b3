// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func bodyOf(chunks ...string) Body {
	var b Body
	for _, c := range chunks {
		b.Append([]byte(c))
	}
	return b
}

// texts returns what the spans of r say.
func texts(r *Request) []string {
	all := joined(r.Body.Chunks)
	out := []string{}
	for _, s := range r.Text {
		out = append(out, all[s.Start:s.End])
	}
	return out
}

func TestParseText(t *testing.T) {
	f := func(api API, body string, want ...string) {
		t.Helper()
		r, err := Parse(api, split([]byte(body), []byte{3}))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(append([]string{}, want...), texts(r)); diff != "" {
			t.Errorf("%s (-want +got)\n%s", body, diff)
		}
	}
	f(Chat, `{"messages":[{"role":"user","content":"hi \n you"},{"content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"u"}},{"text":""}]}],"tools":[{"x":1}]}`,
		"user", `hi \n you`, "a", `[{"x":1}]`)
	f(Chat, `{"tools":null,"messages":[{"role":"assistant","tool_calls":[{"id":"c"}],"content":null},{"role":"tool","tool_call_id":"c","content":"42"}]}`,
		"assistant", `[{"id":"c"}]`, "tool", "42")
	f(Chat, `{"messages":[{"content":"dropped"}],"tools":"t","messages":[{"content":"gone","role":"r","content":"kept"}]}`, "t", "r", "kept")
	f(Completions, `{"prompt":"p","suffix":"s"}`, "p")
	f(Completions, `{"prompt":["a","b"]}`, "a", "b")
	f(Completions, `{"prompt":[1, 2,3]}`, "[1, 2,3]")
	f(Completions, `{"prompt":[[1,2],[3],[]]}`, "[1,2]", "[3]")
	f(Responses, `{"instructions":"i","input":[{"type":"message","role":"user","content":[{"type":"input_text","text":"q"}]},{"type":"function_call_output","call_id":"1","output":"o"}]}`,
		"i", "user", "q", "o")
	f(Responses, `{"input":"in"}`, "in")
	f(Messages, `{"system":[{"type":"text","text":"s"}],"messages":[{"role":"user","content":[{"type":"tool_result","content":[{"type":"text","text":"r"}]},{"type":"tool_use","name":"n","input":{"k":1}}]}]}`,
		"s", "user", "r", "n", `{"k":1}`)
	f(Generate, `{"token_ids":[1,2],"prompt":"not read"}`, "[1,2]")
	f(SGLangGenerate, `{"text":"t","sampling_params":{"max_new_tokens":1}}`, "t")
	f(Embeddings, `{"input":["a","b"]}`, "a", "b")
	f(Unknown, `{"prompt":"p"}`)
}

func TestParseMedia(t *testing.T) {
	f := func(api API, body string, want ...string) {
		t.Helper()
		r, err := Parse(api, split([]byte(body), []byte{4}))
		if err != nil {
			t.Fatal(err)
		}
		got := []string{}
		for _, m := range r.Media {
			got = append(got, fmt.Sprintf("%s %s in %s", m.Kind, body[m.Span.Start:m.Span.End], body[m.Part.Start:m.Part.End]))
		}
		if diff := cmp.Diff(append([]string{}, want...), got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", body, diff)
		}
	}
	f(Chat, `{"messages":[{"content":[{"type":"image_url","image_url":{"url":"u"}},{"type":"input_audio","input_audio":{"data":"d"}},{"video_url":"v"}]}]}`,
		`image_url {"url":"u"} in {"type":"image_url","image_url":{"url":"u"}}`,
		`input_audio {"data":"d"} in {"type":"input_audio","input_audio":{"data":"d"}}`,
		`video_url "v" in {"video_url":"v"}`)
	f(Messages, `{"messages":[{"content":[{"source":{"data":"d"},"type":"image"},{"type":"document","source":{}}]}]}`,
		`image_url {"data":"d"} in {"source":{"data":"d"},"type":"image"}`)
	f(Responses, `{"input":[{"content":[{"type":"input_image","image_url":null},{"type":"input_image","image_url":"u"}]}]}`,
		`image_url "u" in {"type":"input_image","image_url":"u"}`)
	f(SGLangGenerate, `{"text":"t","image_data":["a",["b"]]}`, `image_url "a" in `, `image_url "b" in `)
	f(Chat, `{"messages":[{"content":[{"image_url":"old","image_url":"new"}]}]}`, `image_url "new" in {"image_url":"old","image_url":"new"}`)
}

func TestParseFields(t *testing.T) {
	f := func(api API, body string, want Request) {
		t.Helper()
		r, err := Parse(api, bodyOf(body))
		if err != nil {
			t.Fatal(err)
		}
		got := Request{
			Model: r.Model, HasModel: r.HasModel, Stream: r.Stream, MaxTokens: r.MaxTokens, N: r.N, Prompts: r.Prompts,
			TokenIDs: r.TokenIDs, CacheSalt: r.CacheSalt, Bars: r.Bars, HasTransferFields: r.HasTransferFields,
		}
		want.N, want.Prompts = max(want.N, 1), max(want.Prompts, 1)
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(Request{}, scanned{}, extent{})); diff != "" {
			t.Errorf("%s (-want +got)\n%s", body, diff)
		}
	}
	f(Chat, `{}`, Request{})
	f(Chat, `{"model":null,"stream":null,"max_tokens":null,"n":null,"cache_salt":null}`, Request{})
	f(Chat, `{"model":"a","model":"b\u0021"}`, Request{Model: "b!", HasModel: true})
	f(Chat, `{"model":"a","model":null}`, Request{})
	f(Chat, `{"model":5,"model":"a"}`, Request{Model: "a", HasModel: true})
	f(Chat, `{"\u006dodel":"a"}`, Request{Model: "a", HasModel: true})
	f(Chat, `{"Model":"a"}`, Request{})
	f(Chat, `{"max_tokens":5}`, Request{MaxTokens: 5})
	f(Chat, `{"max_tokens":5,"max_completion_tokens":6}`, Request{MaxTokens: 6})
	f(Chat, `{"max_completion_tokens":null,"max_tokens":5}`, Request{MaxTokens: 5})
	f(Chat, `{"max_tokens":1e2}`, Request{MaxTokens: 100})
	f(Chat, `{"max_tokens":"7","stream":"true","n":2.0}`, Request{MaxTokens: 7, Stream: true, N: 2})
	f(Chat, `{"max_tokens":-5,"n":0}`, Request{})
	f(Chat, `{"max_tokens":99999999999999999999}`, Request{MaxTokens: math.MaxInt32})
	f(Responses, `{"max_output_tokens":5,"max_tokens":6,"n":7}`, Request{MaxTokens: 5})
	f(Generate, `{"token_ids":[1,2,3],"sampling_params":{"max_tokens":5,"n":2},"max_tokens":6}`, Request{MaxTokens: 5, N: 2, TokenIDs: 3})
	f(Generate, `{"sampling_params":{"max_tokens":5},"sampling_params":{"n":2}}`, Request{N: 2})
	f(SGLangGenerate, `{"input_ids":[[1],[2,3]],"sampling_params":{"max_new_tokens":5},"extra_key":"k"}`,
		Request{MaxTokens: 5, TokenIDs: 3, Prompts: 2, CacheSalt: "k", Bars: BarSeveralPrompts})
	f(Completions, `{"prompt":["a","b"]}`, Request{Prompts: 2, Bars: BarSeveralPrompts})
	f(Completions, `{"prompt":"a","prompt_embeds":"b"}`, Request{Prompts: 2, Bars: BarSeveralPrompts})
	f(Completions, `{"prompt":[]}`, Request{})
	f(Completions, `{"echo":true,"prompt_logprobs":0,"best_of":2,"use_beam_search":1,"truncate_prompt_tokens":-1}`,
		Request{Bars: BarEcho | BarPromptLogprobs | BarBestOf | BarBeamSearch | BarTruncatePrompt})
	f(Completions, `{"echo":false,"prompt_logprobs":null,"best_of":1,"use_beam_search":null,"truncate_prompt_tokens":null}`, Request{})
	f(Completions, `{"echo":[],"best_of":{}}`, Request{Bars: BarEcho | BarBestOf})
	f(Generate, `{"sampling_params":{"prompt_logprobs":1}}`, Request{Bars: BarPromptLogprobs})
	f(Responses, `{"truncation":"auto","previous_response_id":"r"}`, Request{Bars: BarTruncation | BarPreviousResponse})
	f(Responses, `{"truncation":"disabled","previous_response_id":null}`, Request{})
	f(Embeddings, `{"input":"a"}`, Request{Bars: BarEmbeddings})
	f(Unknown, `{"model":"a","stream":true}`, Request{Bars: BarNotJSON})
	f(Unknown, `[NaN]`, Request{Bars: BarNotJSON})
	for _, body := range []string{
		`{"kv_transfer_params":null}`, `{"k\u0076_transfer_params":1}`, `{"ec_transfer_params":1}`, `{"disaggregated_params":1}`,
		`{"bootstrap_host":1}`, `{"bootstrap_":1}`, `{"bootst\u0072ap_room":1}`, `{"bootstrap_` + strings.Repeat("x", 1000) + `":1}`,
		`{"` + "b" + strings.Repeat(`\u006f`, 2) + `tstrap_p` + strings.Repeat(`\u0078`, 99) + `":1}`,
		`{"sampling_params":{"extra_args":{"kv_transfer_params":1}},"sampling_params":null}`,
		`{"sampling_params":{"extra_args":{"kv_transfer_params":1},"extra_args":1}}`,
		`{"sampling_params":[{"extra_args":{"kv_transfer_params":1}}]}`, `{"sampling_params":{"kv_transfer_params":1}}`,
		`{"vllm_xargs":{"kv_transfer_params":"x"}}`, `{"extra_args":{"kv_transfer_params":1}}`,
	} {
		f(Chat, body, Request{HasTransferFields: true})
		f(Unknown, body, Request{HasTransferFields: true, Bars: BarNotJSON})
	}
	f(Chat, `{"bootstrap":1,"x":{"kv_transfer_params":1},"messages":[{"kv_transfer_params":1}],"kv_transfer_params ":1}`, Request{})
}

func TestParseMalformed(t *testing.T) {
	f := func(api API, body, want string) {
		t.Helper()
		for _, size := range []byte{0, 1, 2, 3} {
			_, err := Parse(api, split([]byte(body), []byte{size}))
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), want) || len(err.Error()) > 120 {
				t.Errorf("%q by %d: got %v, want %s", body, size, err, want)
			}
		}
	}
	f(Chat, ``, "the body ends, want a JSON object at byte 0")
	f(Chat, `  `, "the body ends, want a JSON object at byte 2")
	f(Chat, `[]`, "unexpected byte 0x5b, want a JSON object at byte 0")
	f(Chat, `"x"`, "want a JSON object")
	f(Chat, "\xef\xbb\xbf{}", "unexpected byte 0xef, want a JSON object at byte 0")
	f(Chat, "\xff\xfe{\x00}\x00", "want a JSON object")
	f(Chat, "{\x00\"\x00", "unexpected byte 0x00, want a key at byte 1")
	f(Chat, "\x00{", "unexpected byte 0x00, want a JSON object")
	f(Chat, `{} x`, "unexpected byte 0x78, want the end at byte 3")
	f(Chat, `{}{}`, "want the end")
	f(Chat, "{}\x00", "unexpected byte 0x00, want the end at byte 2")
	f(Chat, `{"a":1,}`, "want a key at byte 7")
	f(Chat, `{"a":[1,]}`, "want a value at byte 8")
	f(Chat, `{"a":[,1]}`, "want a value at byte 6")
	f(Chat, `{"a" 1}`, "want a colon")
	f(Chat, `{"a":1 "b":2}`, "want a comma or the object's end")
	f(Chat, `{'a':1}`, "want a key")
	f(Chat, `{"a":01}`, "want a comma")
	f(Chat, `{"a":+1}`, "want a value")
	f(Chat, `{"a":.5}`, "want a value")
	f(Chat, `{"a":1.}`, "want a digit")
	f(Chat, `{"a":1e}`, "want a digit")
	f(Chat, `{"a":-}`, "want a value")
	f(Chat, `{"a":-NaN}`, "want a value")
	f(Chat, `{"a":nan}`, "want null")
	f(Chat, `{"a":tru}`, "want true")
	f(Chat, `{"a":"`+"\n"+`"}`, "control character in a string at byte 6")
	f(Chat, `{"a":"\x"}`, "want an escape")
	f(Chat, `{"a":"\u12g4"}`, "want a hexadecimal digit")
	f(Chat, `{"a":"x`, "the body ends inside a string at byte 7")
	f(Chat, `{"a":"\`, "the body ends, want an escape")
	f(Chat, "{\"a\":\"\xc3\"}", "invalid UTF-8 in the string at byte 6")
	f(Chat, "{\"a\":\"\xed\xa0\x80\"}", "invalid UTF-8")
	f(Chat, "{\"\xf5\":1}", "invalid UTF-8")
	f(Chat, `{"model":5}`, "model is not a string at byte 9")
	f(Chat, `{"model":"a","model":["b"]}`, "model is not a string at byte 21")
	f(Chat, `{"model":"`+strings.Repeat("a", 5000)+`"}`, "model is not of a sensible length")
	f(Chat, `{"stream":"maybe"}`, "stream is not a boolean")
	f(Chat, `{"max_tokens":1.5}`, "max_tokens is not an integer")
	f(Chat, `{"max_tokens":NaN}`, "max_tokens is not an integer")
	f(Chat, `{"n":{}}`, "n is not an integer")
	f(Chat, `{"cache_salt":1}`, "cache_salt is not a string")
	f(Generate, `{"sampling_params":{"max_tokens":"x"}}`, "max_tokens is not an integer")
	f(Chat, strings.Repeat(`{"a":`, 513)+`1`+strings.Repeat(`}`, 513), "nested too deeply")
	f(Unknown, `{"a":}`, "want a value")
	f(Unknown, `{} {}`, "want the end")
}

// TestHostile feeds bodies that are made to cost much.
func TestHostile(t *testing.T) {
	f := func(name string, api API, ok bool, body string) {
		t.Helper()
		b := bodyOf(body)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		r, err := Parse(api, b)
		runtime.ReadMemStats(&after)
		if (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > uint64(2<<20+len(body)/4) {
			t.Errorf("%s: a body of %d bytes took %d", name, len(body), grown)
		}
		if r != nil && (len(r.Text) > maxTexts || len(r.Media) > maxMedia) {
			t.Errorf("%s: %d spans, %d media", name, len(r.Text), len(r.Media))
		}
	}
	list := func(item string, n int) string { return strings.TrimSuffix(strings.Repeat(item+",", n), ",") }
	const many = 1 << 17
	f("empty messages", Chat, true, `{"messages":[`+list(`{}`, many)+`]}`)
	f("empty texts", Chat, true, `{"messages":[`+list(`{"role":"","content":""}`, many)+`]}`)
	f("short texts", Completions, true, `{"prompt":[`+list(`"a"`, many)+`]}`)
	f("media", Chat, true, `{"messages":[{"content":[`+list(`{"image_url":"a"}`, many/4)+`]}]}`)
	f("duplicate roles", Chat, true, `{"messages":[{"content":[`+list(`"a"`, many)+`],`+list(`"role":"a"`, many/4)+`}]}`)
	f("duplicate contents", Chat, true, `{"messages":[{`+list(`"content":["a","b"],"role":"c"`, many/4)+`}]}`)
	f("duplicate messages", Chat, false, `{`+list(`"messages":["a"]`, many/4)+`}`)
	f("fields", Chat, false, `{`+list(`"a":1`, many)+`}`)
	f("fields of an unknown API", Unknown, true, `{`+list(`"a":1`, many)+`}`)
	f("transfer fields", Unknown, false, `{`+list(`"bootstrap_":1`, many)+`}`)
	f("sampling parameters", Chat, false, `{`+list(`"sampling_params":{"extra_args":{"bootstrap_":1}}`, many/16)+`}`)
	f("prompts", Completions, true, `{"prompt":[`+list(`[1]`, many)+`]}`)
	f("nested lists", Chat, true, `{"messages":`+strings.Repeat("[", 500)+strings.Repeat("]", 500)+`}`)
	f("deep", Unknown, false, strings.Repeat("[", many))
	f("escaped keys", Chat, true, `{"x":{`+list(`"\u0061":1`, many/2)+`}}`)
}

func TestChunks(t *testing.T) {
	r, err := Parse(Chat, bodyOf(`{"mod`, ``, `el":"ti`, `ny","messages":[{"content":"caf`+"\xc3", "\xa9 \\", `u00`, `e9"}]`, `}`, ` `))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{`café \u00e9`}, texts(r)); r.Model != "tiny" || diff != "" {
		t.Errorf("model %q, %s", r.Model, diff)
	}
	empty := Body{Chunks: [][]byte{nil, {}, []byte("{}")}, Len: 2}
	if _, err := Parse(Chat, empty); err != nil {
		t.Error(err)
	}
}

func TestPathAPI(t *testing.T) {
	f := func(path string, want API) {
		t.Helper()
		if got := PathAPI(path); got != want {
			t.Errorf("%q: got %d, want %d", path, got, want)
		}
	}
	f("/v1/chat/completions", Chat)
	f("/v1/chat/completions?x=/v1/messages", Chat)
	f("/v1/chat/completions/", Chat)
	f("//v1//chat///completions//", Chat)
	f("/openai/v1/chat/completions", Chat)
	f("/v1/%63hat/completions", Chat)
	f("/v1%2Fchat%2fcompletions", Chat)
	f("/v1/chat/completions%0A", Chat)
	f("/v1/x/../chat/./completions", Chat)
	f("/v1/chat/completions%3Fx", Unknown)
	f("/v1/completions", Completions)
	f("/v1/responses", Responses)
	f("/v1/responses/resp_1", Unknown)
	f("/v1/embeddings", Embeddings)
	f("/v1/messages", Messages)
	f("/v1/messages/count_tokens", Unknown)
	f("/inference/v1/generate", Generate)
	f("/generate", SGLangGenerate)
	f("/v1/generate", SGLangGenerate)
	f("/regenerate", Unknown)
	f("/V1/chat/completions", Unknown)
	f("/v1/chat/completions%", Unknown)
	f("/?/v1/chat/completions", Unknown)
	f("", Unknown)
}

func TestField(t *testing.T) {
	f := func(object, name, want string, ok bool) {
		t.Helper()
		raw, found, err := Field([]byte(object), name)
		if string(raw) != want || found != ok || err != nil {
			t.Errorf("%s: got %q, %v, %v", object, raw, found, err)
		}
	}
	f(`{"a": {"b":[1, 2]} , "c":3}`, "a", `{"b":[1, 2]}`, true)
	f(`{"a":1,"a":null}`, "a", `null`, true)
	f(`{"\u0061":"x"}`, "a", `"x"`, true)
	f(`{"A":1,"b":{"a":1}}`, "a", ``, false)
	f(` {} `, "a", ``, false)
	f(`{"id":9007199254740993}`, "id", `9007199254740993`, true)
	f(`{"":1}`, "", `1`, true)
	for _, bad := range []string{``, `[]`, `{"a":1`, `{"a":1}x`, `{"a":1,"b":}`, "{\"b\":\"\xff\"}"} {
		if raw, ok, err := Field([]byte(bad), "a"); raw != nil || ok || !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: got %q, %v, %v", bad, raw, ok, err)
		}
	}
}
