// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"net/http"
)

func (p *process) serveHealth(x *exchange) {
	x.w.Header()["Content-Length"] = []string{"0"}
	x.w.WriteHeader(http.StatusOK)
}

func (p *process) serveVersion(x *exchange) { x.json(http.StatusOK, []byte(`{"version":"0.32.0"}`)) }

// serveWeightInfo answers what vLLM serves in development mode.
func (p *process) serveWeightInfo(x *exchange) {
	x.json(http.StatusOK, []byte(`{"weight_version":"default"}`))
}

// refusePreflight answers a CORS preflight, whose origin a vLLM without --allowed-origins does not allow.
func (x *exchange) refusePreflight() {
	h := x.w.Header()
	h["Vary"] = []string{"Origin, Access-Control-Request-Method, Access-Control-Request-Headers, Access-Control-Request-Private-Network"}
	h["Access-Control-Allow-Methods"] = []string{"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY"}
	h["Access-Control-Max-Age"] = []string{"600"}
	h["Content-Type"] = []string{"text/plain; charset=utf-8"}
	x.json(http.StatusBadRequest, []byte("Disallowed CORS origin"))
}

func (p *process) serveLoad(x *exchange) {
	n := 0
	for _, q := range p.ranks {
		q.mu.Lock()
		capacity, adapter := q.waiting()
		n += q.running + capacity + adapter + q.deferred
		q.mu.Unlock()
	}
	x.json(http.StatusOK, marshal(struct {
		Load int `json:"server_load"`
	}{n}))
}

// serveScaleOutOff answers the routes that need --enable-scale-out.
func (p *process) serveScaleOutOff(x *exchange) {
	x.fail(&apiError{
		status: http.StatusForbidden, kind: "PermissionDeniedError",
		message: "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.",
	})
}

type modelPermission struct {
	ID                 string `json:"id"`
	Object             string `json:"object"`
	Created            int64  `json:"created"`
	AllowCreateEngine  bool   `json:"allow_create_engine"`
	AllowSampling      bool   `json:"allow_sampling"`
	AllowLogprobs      bool   `json:"allow_logprobs"`
	AllowSearchIndices bool   `json:"allow_search_indices"`
	AllowView          bool   `json:"allow_view"`
	AllowFineTuning    bool   `json:"allow_fine_tuning"`
	Organization       string `json:"organization"`
	Group              null   `json:"group"`
	IsBlocking         bool   `json:"is_blocking"`
}

type modelCard struct {
	ID          string            `json:"id"`
	Object      string            `json:"object"`
	Created     int64             `json:"created"`
	OwnedBy     string            `json:"owned_by"`
	Root        string            `json:"root"`
	Parent      *string           `json:"parent"`
	MaxModelLen *int              `json:"max_model_len"`
	Permission  []modelPermission `json:"permission"`
}

func (p *process) serveModels(x *exchange) {
	o := &p.e.opts
	created := p.started.Unix()
	one := func(id, root string, parent *string, limit *int) modelCard {
		return modelCard{
			ID: id, Object: "model", Created: created, OwnedBy: "vllm", Root: root, Parent: parent, MaxModelLen: limit,
			Permission: []modelPermission{{
				ID: "modelperm-" + p.e.hex(8), Object: "model_permission", Created: created, AllowSampling: true,
				AllowLogprobs: true, AllowView: true, Organization: "*",
			}},
		}
	}
	list := struct {
		Object string      `json:"object"`
		Data   []modelCard `json:"data"`
	}{Object: "list", Data: []modelCard{one(o.Model, "model", nil, &o.MaxModelLen)}}
	for _, l := range o.LoRAs {
		list.Data = append(list.Data, one(l, "lora/"+l, &o.Model, nil))
	}
	x.json(http.StatusOK, marshal(list))
}

// serveTokenize answers /tokenize for a prompt or messages.
func (p *process) serveTokenize(x *exchange) {
	f, tokens := p.readTokens(x, apiChat)
	if f == nil {
		return
	}
	answer := struct {
		Count       int      `json:"count"`
		MaxModelLen int      `json:"max_model_len"`
		Tokens      []uint32 `json:"tokens"`
		Strings     []string `json:"token_strs"`
	}{len(tokens), p.e.opts.MaxModelLen, tokens, nil}
	if f.boolean("return_token_strs") {
		for _, id := range tokens {
			answer.Strings = append(answer.Strings, tokenText(id))
		}
	}
	x.json(http.StatusOK, marshal(answer))
}

// readTokens reads a body with a prompt or messages; it answers what is wrong itself and returns nil then.
func (p *process) readTokens(x *exchange, withMessages api) (*fields, []uint32) {
	body, ok := x.readBody()
	if !ok {
		return nil, nil
	}
	f, bad := readObject(body)
	if bad != nil {
		x.fail(bad)
		return nil, nil
	}
	c := &call{n: 1}
	if _, ok := f.raw("messages"); ok {
		c.api = withMessages
	}
	p.e.readPrompt(c, f)
	switch {
	case f.err != nil:
		x.fail(f.err)
	case len(c.prompts) != 1:
		x.fail(invalid("body.prompt", "missing", "Field required", "<body>"))
	default:
		return f, c.prompts[0]
	}
	return nil, nil
}

func (p *process) serveCountTokens(x *exchange) {
	f, tokens := p.readTokens(x, apiMessages)
	if f == nil {
		return
	}
	type original struct {
		Input int `json:"original_input_tokens"`
	}
	x.json(http.StatusOK, marshal(struct {
		Input   int      `json:"input_tokens"`
		Context original `json:"context_management"`
	}{len(tokens), original{len(tokens)}}))
}

func (p *process) serveDetokenize(x *exchange) {
	body, ok := x.readBody()
	if !ok {
		return
	}
	var in struct {
		Tokens []uint32 `json:"tokens"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		x.fail(invalid("body.tokens", "list_type", "Input should be a valid list", "<body>"))
		return
	}
	x.json(http.StatusOK, marshal(struct {
		Prompt string `json:"prompt"`
	}{detokenize(in.Tokens)}))
}

// serveResetCache drops the prefix cache (vLLM serves this in development mode).
func (p *process) serveResetCache(x *exchange) {
	for _, q := range p.ranks {
		q.mu.Lock()
		q.resetCache()
		q.mu.Unlock()
	}
	p.serveHealth(x)
}
