"""Builder and shipped weights of the embedded models.

`burnish miniature build` makes everything from nothing: pictures from `burnish.world`, a tokenizer
from its grammar, an autoencoder, and a base model that draws and edits. The weights ship with the
package.
"""
