// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"net/http"
	"slices"
	"time"
)

const (
	defaultCompletionTokens = 16
	headerRequestID         = "X-Request-Id"
	headerAttempt           = "X-Processor-Attempt"
	headerRank              = "X-Data-Parallel-Rank"
)

// parse reads and checks a generation request in the order a real server does: shape, model, sampling, length.
func (e *Engine) parse(a api, h http.Header, body []byte) (*call, *apiError) {
	f, bad := readObject(body)
	if bad != nil {
		return nil, bad
	}
	if a == apiNative {
		return e.parseNative(h, f)
	}
	c := &call{api: a, n: 1, temperature: 1, logprobs: -1, modelLimit: e.opts.MaxModelLen, created: time.Now().Unix()}
	c.requestID, c.attempt = h.Get(headerRequestID), h.Get(headerAttempt)
	sampling := f
	var extra *fields
	if a == apiGenerate {
		if sampling = f.object("sampling_params"); sampling == nil {
			sampling = &fields{}
		}
		extra = sampling.object("extra_args")
	}
	c.fields, c.extra = f, extra
	c.transfer = rawTransfer(f, extra)
	c.phase = phaseOf(c.transfer)
	c.readCommon(f, sampling)
	e.readPrompt(c, f)
	for _, err := range []*apiError{c.checkFields(f), f.err, sampling.err, c.checkPrompt(), e.chooseModel(c, f.text("model")), c.checkSampling(sampling), e.checkRank(h)} {
		if err != nil {
			return c, err
		}
	}
	c.id = e.answerID(c)
	for _, t := range c.prompts {
		if len(t) >= c.modelLimit {
			return c, tooLong(len(t), c.modelLimit)
		}
	}
	return c, nil
}

// answerID is the answer's id: the client's X-Request-Id, where there is one, behind the API's prefix.
func (e *Engine) answerID(c *call) string {
	id := c.requestID
	if id == "" || c.api == apiResponses {
		id = e.hex(8)
	}
	switch c.api {
	case apiCompletions:
		return "cmpl-" + id
	case apiResponses:
		return "resp_" + id
	case apiGenerate:
		return "generate-tokens-" + id
	case apiChat, apiMessages, apiNative:
	}
	return "chatcmpl-" + id
}

// readCommon reads what is not the prompt.
func (c *call) readCommon(f, sampling *fields) {
	c.stream = f.boolean("stream")
	if so := f.object("stream_options"); so != nil {
		c.usage = so.boolean("include_usage")
		c.contUsage = so.boolean("continuous_usage_stats")
	}
	if n, ok := sampling.integer("n"); ok {
		c.n = n
	}
	if t, ok := sampling.number("temperature"); ok {
		c.temperature = t
	}
	if s, ok := sampling.integer("seed"); ok {
		c.seed = uint64(s) //nolint:gosec // any bits will do
	}
	c.minTokens, _ = sampling.integer("min_tokens")
	c.stop = append(sampling.texts("stop"), sampling.texts("stop_sequences")...)
	c.cacheSalt = f.text("cache_salt")
	c.returnTokens = f.boolean("return_token_ids")
	c.readLimit(f, sampling)
	_, c.promptLogs = sampling.raw("prompt_logprobs")
	switch c.api {
	case apiCompletions:
		c.echo = f.boolean("echo")
		if n, ok := f.integer("logprobs"); ok {
			c.logprobs = n
		}
	case apiChat:
		if f.boolean("logprobs") {
			c.logprobs, _ = f.integer("top_logprobs")
		}
	case apiResponses, apiMessages, apiGenerate, apiNative:
	}
}

// readLimit finds the token limit under the name that the API gives it.
func (c *call) readLimit(f, sampling *fields) {
	names := []string{"max_tokens"}
	switch c.api {
	case apiChat:
		names = []string{"max_completion_tokens", "max_tokens"}
	case apiResponses:
		names = []string{"max_output_tokens"}
	case apiCompletions, apiMessages, apiGenerate, apiNative:
	}
	for _, name := range names {
		if n, ok := sampling.integer(name); ok {
			c.maxTokens = n
			if n <= 0 {
				c.maxTokens = -1
			}
			return
		}
	}
	if c.api == apiCompletions || c.api == apiGenerate {
		c.maxTokens = defaultCompletionTokens
		return
	}
	c.natural = !f.boolean("ignore_eos")
}

// checkFields is the request models' own validation: fields that are missing or do not go together.
func (c *call) checkFields(f *fields) *apiError {
	if _, ok := f.raw("stream_options"); ok && !c.stream {
		return badRequest("stream_options", "Stream options can only be defined when `stream=True`. (parameter=stream_options)")
	}
	var needed []string
	switch c.api {
	case apiChat:
		needed = []string{"messages"}
	case apiMessages:
		needed = []string{"messages", "max_tokens"}
	case apiResponses:
		needed = []string{"input"}
	case apiGenerate:
		needed = []string{"token_ids"}
	case apiCompletions, apiNative:
	}
	for _, name := range needed {
		if _, ok := f.raw(name); !ok {
			return invalid("body."+name, "missing", "Field required", fmt.Sprintf("<dict of %d items>", len(f.m)))
		}
	}
	return nil
}

// checkPrompt refuses a request without a prompt.
func (c *call) checkPrompt() *apiError {
	for _, t := range c.prompts {
		if len(t) == 0 {
			return badRequest("prompt", "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)")
		}
	}
	if len(c.prompts) == 0 {
		return badRequest("prompt", "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)")
	}
	return nil
}

// chooseModel accepts the served model, an adapter, or no name at all.
func (e *Engine) chooseModel(c *call, name string) *apiError {
	c.model = name
	switch {
	case name == "":
		c.model = e.opts.Model
	case name == e.opts.Model:
	case slices.Contains(e.opts.LoRAs, name):
		c.lora = name
	default:
		return &apiError{
			status: http.StatusNotFound, kind: "NotFoundError", param: "model",
			message: fmt.Sprintf("The model `%s` does not exist. Valid aliases: %s.", name, e.opts.Model),
		}
	}
	return nil
}

// checkSampling is what SamplingParams refuses.
func (c *call) checkSampling(sampling *fields) *apiError {
	switch {
	case c.n < 1:
		return badRequest("", "n must be at least 1, got %d.", c.n)
	case c.temperature < 0:
		t := pythonFloat(c.temperature)
		return badRequest("temperature", "temperature must be non-negative, got %s. (parameter=temperature, value=%s)", t, t)
	case c.maxTokens < 0:
		n, _ := sampling.integer("max_tokens")
		return badRequest("max_tokens", "max_tokens must be at least 1, got %d. (parameter=max_tokens, value=%d)", n, n)
	case c.maxTokens > c.modelLimit:
		return badRequest("max_tokens", "max_tokens=%d cannot be greater than max_model_len=%d. Please request fewer output tokens. "+
			"(parameter=max_tokens, value=%d)", c.maxTokens, c.modelLimit, c.maxTokens)
	case c.minTokens > 0 && c.maxTokens > 0 && c.minTokens > c.maxTokens:
		return badRequest("", "min_tokens must be less than or equal to max_tokens=%d, got %d.", c.maxTokens, c.minTokens)
	}
	return nil
}
