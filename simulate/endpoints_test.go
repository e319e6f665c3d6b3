// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"reflect"
	"testing"
	"time"
)

func TestEmbeddings(t *testing.T) {
	e := newEngine(t, Options{Embeddings: true, BlockSize: 16})
	ask := func(body string) embeddingAnswer {
		t.Helper()
		r := post(t, e, "/v1/embeddings", body)
		var v embeddingAnswer
		if err := json.Unmarshal(r.body, &v); err != nil || r.status != http.StatusOK {
			t.Fatalf("%d %s", r.status, r.body)
		}
		return v
	}
	one := ask(`{"model":"tiny","input":"some text of two blocks, or of even more than that: it goes on and on for long"}`)
	if len(one.Data) != 1 || len(one.Data[0].Embedding.([]any)) != embeddingSize || one.Usage.Prompt != 20 || one.Usage.Total != 20 || one.Usage.Completion != 0 {
		t.Errorf("one input: %+v", one)
	}
	two := ask(`{"model":"tiny","input":["some text of two blocks, or of even more than that: it goes on and on for long",[1,2,3]],"dimensions":3}`)
	if len(two.Data) != 2 || two.Data[1].Index != 1 || len(two.Data[1].Embedding.([]any)) != 3 || two.Usage.Prompt != 23 {
		t.Errorf("two inputs: %+v", two)
	}
	packed := ask(`{"input":[1,2,3],"encoding_format":"base64"}`)
	raw, err := base64.StdEncoding.DecodeString(packed.Data[0].Embedding.(string))
	if err != nil || len(raw) != 4*embeddingSize || packed.Model != "tiny" {
		t.Errorf("base64: %+v, %v", packed, err)
	}
	if again := ask(`{"input":[1,2,3],"encoding_format":"base64"}`); !reflect.DeepEqual(again.Data, packed.Data) {
		t.Error("equal inputs have unequal embeddings")
	}
	if s := e.Stats(); s.PrefixHits == 0 || s.Requests != 4 {
		t.Errorf("prefix hits %d of %d requests", s.PrefixHits, s.Requests)
	}
	for body, want := range map[string]int{`{`: 400, `{}`: 400, `{"input":"x","model":"other"}`: 404, `{"input":[]}`: 400} {
		if r := post(t, e, "/v1/embeddings", body); r.status != want {
			t.Errorf("%s: %d, want %d", body, r.status, want)
		}
	}
	setFaults(t, e, Faults{Rules: []Fault{{Kind: faultStatus, Next: 1}, {Kind: faultTruncated, Next: 1}}})
	if r := post(t, e, "/v1/embeddings", `{"input":"x"}`); r.status != http.StatusServiceUnavailable {
		t.Errorf("fault: %d", r.status)
	}
	if r := post(t, e, "/v1/embeddings", `{"input":"x"}`); json.Valid(r.body) {
		t.Errorf("fault: %s", r.body)
	}
}

type embeddingAnswer struct {
	Model string
	Data  []struct {
		Index     int
		Embedding any
	}
	Usage struct {
		Prompt     int `json:"prompt_tokens"`
		Total      int `json:"total_tokens"`
		Completion int `json:"completion_tokens"`
	}
}

// TestRenderedRequestsGenerateTheSame renders a request and sends what came out to the generate route.
func TestRenderedRequestsGenerateTheSame(t *testing.T) {
	e := newEngine(t, Options{ScaleOut: true, Seed: 1})
	media := `{"type":"image_url","image_url":{"url":"http://x/1.png"}}`
	for path, body := range map[string]string{
		"/v1/completions":      `{"model":"tiny","prompt":"a prompt","max_tokens":7,"temperature":0,"stop":["zz"]}`,
		"/v1/chat/completions": `{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"hi"},` + media + `]}],"max_tokens":7,"temperature":0,"return_token_ids":true}`,
	} {
		r := post(t, e, path+"/render", body)
		if r.status != http.StatusOK {
			t.Fatalf("%s: %d %s", path, r.status, r.body)
		}
		one := r.body
		if one[0] == '[' {
			one = one[1 : len(one)-1]
		}
		var v struct {
			Tokens   []uint32 `json:"token_ids"`
			Features *struct {
				Hashes       map[string][]string        `json:"mm_hashes"`
				Placeholders map[string][]placeholder   `json:"mm_placeholders"`
				Other        map[string]json.RawMessage `json:"-"`
			} `json:"features"`
		}
		if err := json.Unmarshal(one, &v); err != nil {
			t.Fatal(err)
		}
		var generated, direct struct {
			Choices []struct {
				Tokens []uint32 `json:"token_ids"`
			}
			Usage struct {
				Prompt int `json:"prompt_tokens"`
			}
		}
		g := post(t, e, "/inference/v1/generate", string(one))
		d := post(t, e, path, `{"return_token_ids":true,`+body[1:])
		if json.Unmarshal(g.body, &generated) != nil || json.Unmarshal(d.body, &direct) != nil || len(generated.Choices) != 1 ||
			!reflect.DeepEqual(generated, direct) || generated.Usage.Prompt != len(v.Tokens) || len(generated.Choices[0].Tokens) != 7 {
			t.Errorf("%s\n generated %s\n directly %s", path, g.body, d.body)
		}
		if path == "/v1/completions" {
			if v.Features != nil {
				t.Errorf("features of a text: %+v", v.Features)
			}
		} else if f := v.Features; f == nil || len(f.Hashes["image"]) != 1 || f.Placeholders["image"][0].Length != mediaTokens ||
			v.Tokens[f.Placeholders["image"][0].Offset] != v.Tokens[f.Placeholders["image"][0].Offset+mediaTokens-1] {
			t.Errorf("features of a chat with an image: %+v", v.Features)
		}
	}
	if r := post(t, e, "/v1/chat/completions/render", `{"messages":[]}`); r.status != http.StatusBadRequest {
		t.Errorf("bad request: %d", r.status)
	}
	off := newEngine(t, Options{KeepAlive: time.Hour})
	if r := post(t, off, "/v1/completions/render", `{"prompt":"x"}`); r.status != http.StatusForbidden {
		t.Errorf("without --enable-scale-out: %d", r.status)
	}
}

func TestTensorRTServesItsMetricsTwice(t *testing.T) {
	trt := newEngine(t, Options{Engine: engineTRTLLM})
	if a, b := get(t, trt, "/metrics"), get(t, trt, "/prometheus/metrics"); b.status != http.StatusOK || string(a.body) != string(b.body) {
		t.Errorf("%d %s", b.status, b.body)
	}
	if r := get(t, newEngine(t, Options{}), "/prometheus/metrics"); r.status != http.StatusNotFound {
		t.Errorf("vLLM: %d", r.status)
	}
}
