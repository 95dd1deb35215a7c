/* EdgeLLM in plain C: load a model, generate, chat, learn an adapter from examples, save and load adapters.
 *
 * Every function that can fail returns a status; edgellm_last_error() then has one sentence on what was expected and found.
 * Texts are UTF-8 and end with a zero byte. All calls block; callbacks run on the calling thread, before the call returns.
 * An engine does one thing at a time: a second call fails with EDGELLM_BUSY. edgellm_info, edgellm_cancel, edgellm_pause and
 * edgellm_resume may be called at any time from any thread. Several engines work side by side.
 */
#ifndef EDGELLM_H
#define EDGELLM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A loaded model. */
typedef struct edgellm_engine edgellm_engine;

typedef enum edgellm_status {
    EDGELLM_OK = 0,
    /* An argument or an option is out of range, or does not go with the model. */
    EDGELLM_BAD_ARGUMENT = 1,
    /* A model, policy or adapter cannot be read, written or run. */
    EDGELLM_MODEL = 2,
    /* It does not fit into the memory budget. */
    EDGELLM_MEMORY = 3,
    /* The engine is doing something else. */
    EDGELLM_BUSY = 4,
    /* A callback returned a value that it may not. */
    EDGELLM_LISTENER = 5,
    /* A fault of this library. */
    EDGELLM_INTERNAL = 6
} edgellm_status;

typedef struct edgellm_load_options {
    /* Bytes for weights, keys and values of the context, and buffers of tuning; 0: no limit. */
    uint64_t memory_budget_bytes;
    /* Compress in memory: a policy file, or one format such as "q4g32a"; NULL: the formats of the file. */
    const char *policy;
    /* Threads of the whole process; 0: all processors. */
    uint32_t threads;
    /* Instruction set of the CPU kernels, such as "neon+dotprod"; NULL: the best. */
    const char *kernels;
} edgellm_load_options;

typedef struct edgellm_generate_options {
    /* Tokens to generate at most. */
    uint32_t max_tokens;
    /* From 0 to 100; 0 always takes the likeliest token. */
    double temperature;
    /* Draw from the likeliest tokens only; 0 for all. */
    uint32_t top_k;
    /* Draw from the likeliest tokens that together reach this probability. */
    double top_p;
    uint64_t seed;
    /* Texts that end the answer, and are not part of it. */
    const char *const *stop;
    size_t n_stop;
} edgellm_generate_options;

typedef struct edgellm_adapt_options {
    /* Optimizer steps. */
    uint32_t steps;
    /* Examples in a step. */
    uint32_t batch;
    /* Rank of the adapter. */
    uint32_t rank;
    /* Blocks that are tuned, counted from the last; 0: 8, or as many of 8 as fit. */
    uint32_t window;
    double learning_rate;
    /* Tokens of an example at most. */
    uint32_t max_tokens;
    /* Bytes for weights and buffers together; 0: the budget that the model was loaded with. */
    uint64_t memory_budget_bytes;
    uint64_t seed;
} edgellm_adapt_options;

typedef struct edgellm_message {
    /* "system", "user" or "assistant". */
    const char *role;
    const char *content;
} edgellm_message;

/* Something to learn from: messages (n_messages > 0), or a prompt and a response, or a text (prompt NULL). */
typedef struct edgellm_example {
    const char *prompt;
    const char *response;
    const edgellm_message *messages;
    size_t n_messages;
} edgellm_example;

typedef enum edgellm_step {
    EDGELLM_STEP_CONTINUE = 0,
    /* Wait for edgellm_resume or edgellm_cancel. */
    EDGELLM_STEP_PAUSE = 1,
    /* End here, with what was learned so far. */
    EDGELLM_STEP_STOP = 2
} edgellm_step;

/* Takes a piece of an answer, valid during the call; returns whether to go on. */
typedef bool (*edgellm_on_token)(const char *text, void *user);
/* Takes note of a step, from 1; returns one of edgellm_step. */
typedef int (*edgellm_on_step)(uint32_t step, uint32_t total, double loss, uint64_t bytes, void *user);

/* The version of the library; never freed. */
const char *edgellm_version(void);
/* What the last call on this thread that failed said; NULL if none did. Valid until the next call of this function on this
 * thread. */
const char *edgellm_last_error(void);
/* Frees a text that a function here handed out. */
void edgellm_string_free(char *text);

edgellm_load_options edgellm_load_options_default(void);
edgellm_generate_options edgellm_generate_options_default(void);
edgellm_adapt_options edgellm_adapt_options_default(void);

/* Loads a Hugging Face folder, a compressed folder or a GGUF file. options may be NULL. */
edgellm_status edgellm_load(const char *path, const edgellm_load_options *options, edgellm_engine **engine);
/* Frees an engine that no call uses. NULL is allowed. */
void edgellm_free(edgellm_engine *engine);
/* JSON: name, architecture, bytes, layers, context, can_chat, kernels, threads. Free it with edgellm_string_free. */
edgellm_status edgellm_info(const edgellm_engine *engine, char **json);

/* Goes on with a text. on_token and json may be NULL; json gets text, tokens, prompt_tokens, reused_tokens, finish
 * (end_of_text, stop_text, length or cancelled), first_token_seconds and seconds. */
edgellm_status edgellm_generate(edgellm_engine *engine, const char *prompt, const edgellm_generate_options *options,
                                edgellm_on_token on_token, void *user, char **json);
/* Answers a conversation with the model's template. */
edgellm_status edgellm_chat(edgellm_engine *engine, const edgellm_message *messages, size_t n_messages,
                            const edgellm_generate_options *options, edgellm_on_token on_token, void *user, char **json);
/* Learns a fresh adapter and uses it from now on. on_step and json may be NULL; json gets steps, stopped, examples,
 * first_loss, last_loss, parameters, window, buffer_bytes and seconds. */
edgellm_status edgellm_adapt(edgellm_engine *engine, const edgellm_example *examples, size_t n_examples,
                             const edgellm_adapt_options *options, edgellm_on_step on_step, void *user, char **json);

/* Writes the adapter in use as a folder; an adapter at that path is replaced. */
edgellm_status edgellm_save_adapter(edgellm_engine *engine, const char *path);
/* Reads an adapter and uses it from now on. */
edgellm_status edgellm_load_adapter(edgellm_engine *engine, const char *path);
/* Uses no adapter from now on. */
edgellm_status edgellm_remove_adapter(edgellm_engine *engine);

/* These three act on the call that runs now; without one, nothing happens. */
edgellm_status edgellm_cancel(edgellm_engine *engine);
edgellm_status edgellm_pause(edgellm_engine *engine);
edgellm_status edgellm_resume(edgellm_engine *engine);

/* Measures this device for some seconds; JSON. Free it with edgellm_string_free. */
edgellm_status edgellm_profile(char **json);

#ifdef __cplusplus
}
#endif

#endif
